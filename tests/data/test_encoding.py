"""Items to embeddings: order, what is ready goes on, and what happens at the edges."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from chatbind_cli.data.encoding import EncodingOptions, encode_items
from chatbind_cli.data.media_items import MediaItem
from chatbind_cli.encoders.imagebind.preprocess import read
from chatbind_cli.errors import ChatBindError, RecordError, WeightsError
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.options import MediaOptions


class FakeEncoder:
    """Embeds a picture as the mean of its pixels, and remembers the sizes of batches."""

    modalities = ("image",)
    read = staticmethod(read)

    def __init__(self) -> None:
        self.batches: list[int] = []

    def embed(self, media: list[Any], *, normalize: bool) -> torch.Tensor:
        assert not normalize
        self.batches.append(len(media))
        return torch.tensor([[float(medium.tensor.mean())] for medium in media])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[MediaItem]:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(12):
        Image.new("L", (8, 8), 20 * i).save(folder / f"{i:02}.png")
    return [MediaItem(Medium(None, path), name=path.name) for path in sorted(folder.iterdir())]


def options(**values: int) -> EncodingOptions:
    return EncodingOptions(media=MediaOptions(), **values)


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 1), (0, 5), (3, 1), (3, 5)])
def test_results_come_in_the_order_of_the_items(
    workers: int, batch_size: int, pictures: list[MediaItem], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    items = [*pictures[:7], MediaItem(Medium(None, broken), name="broken"), *pictures[7:]]
    encoder: Any = FakeEncoder()
    wanted = options(workers=workers, batch_size=batch_size)
    results = list(encode_items(iter(items), encoder, wanted))
    assert [result.item for result in results] == items
    values = [float(r.medium.embedding) for r in results if r.medium.embedding is not None]
    assert values == sorted(values)
    assert len(values) == 12
    assert results[7].error is not None
    assert results[7].medium.embedding is None
    assert max(encoder.batches) <= batch_size
    assert all(len(r.medium.sha256 or "") == 64 for r in results if r.error is None)


def test_what_is_decoded_goes_on_before_the_list_says_more(pictures: list[MediaItem]) -> None:
    answered = threading.Event()

    def slow_list() -> Iterator[MediaItem]:
        yield pictures[0]
        assert answered.wait(20), "the first result waited for the second item"
        yield pictures[1]

    encoder: Any = FakeEncoder()
    results = encode_items(slow_list(), encoder, options(workers=2, batch_size=4))
    first = next(results)
    answered.set()
    assert first.item == pictures[0]
    assert [result.item for result in results] == [pictures[1]]


def test_a_list_that_breaks_off_is_an_error_after_what_came_before(
    pictures: list[MediaItem],
) -> None:
    def broken_list() -> Iterator[MediaItem]:
        yield from pictures[:3]
        raise RecordError("is not JSON", where="list:4")

    encoder: Any = FakeEncoder()
    done = []
    with pytest.raises(RecordError, match="list:4: is not JSON"):
        for result in encode_items(broken_list(), encoder, options(workers=2, batch_size=8)):
            done.append(result.item)
    assert done == pictures[:3]


def test_a_list_that_the_system_cannot_read_is_an_error_too() -> None:
    def unreadable() -> Iterator[MediaItem]:
        raise OSError(9, "Bad file descriptor")
        yield

    encoder: Any = FakeEncoder()
    with pytest.raises(OSError, match="Bad file descriptor"):
        list(encode_items(unreadable(), encoder, options(workers=2, batch_size=8)))


def test_giving_up_early_leaves_no_thread_behind(pictures: list[MediaItem]) -> None:
    before = threading.active_count()
    encoder: Any = FakeEncoder()
    results = encode_items(iter(pictures * 20), encoder, options(workers=2, batch_size=2))
    next(results)
    results.close()
    end = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() <= before  # others may end meanwhile


def test_a_modality_without_a_tower_is_an_error_of_the_item(pictures: list[MediaItem]) -> None:
    encoder: Any = SimpleNamespace(modalities=("audio",), read=read, embed=FakeEncoder().embed)
    (result,) = encode_items(pictures[:1], encoder, options(workers=0, batch_size=1))
    assert isinstance(result.error, ChatBindError)
    assert "has no tower for image" in str(result.error)


def test_what_is_known_by_its_content_is_not_encoded_again(pictures: list[MediaItem]) -> None:
    known = hashlib.sha256(Path(pictures[1].path).read_bytes()).hexdigest()

    def recall(modality: str, sha256: str) -> torch.Tensor | None:
        return torch.tensor([-1.0]) if (modality, sha256) == ("image", known) else None

    encoder: Any = FakeEncoder()
    wanted = EncodingOptions(media=MediaOptions())
    results = list(encode_items(pictures[:3], encoder, wanted, recall))
    assert [r.medium.embedding == -1.0 for r in results] == [
        False,
        True,
        False,
    ]
    assert results[1].medium.sha256 == known
    assert sum(encoder.batches) == 2


class Moody(FakeEncoder):
    """Fails on batches with a white picture, and makes NaN of a black one."""

    def embed(self, media: list[Any], *, normalize: bool) -> torch.Tensor:
        rows = super().embed(media, normalize=normalize)
        if (rows > 1.5).any():
            raise IndexError("odd tensor")
        rows[rows < -1.5] = float("nan")
        return rows


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_medium_that_the_encoder_fails_on_takes_no_other_with_it(
    batch_size: int, pictures: list[MediaItem], tmp_path: Path
) -> None:
    for name, grey in (("black", 0), ("white", 255)):
        Image.new("L", (8, 8), grey).save(tmp_path / f"{name}.png")
    black, white = (
        MediaItem(Medium(None, tmp_path / f"{name}.png"), name=name) for name in ("black", "white")
    )
    encoder: Any = Moody()
    items = [pictures[4], white, pictures[5], black, pictures[6]]
    results = list(encode_items(items, encoder, options(workers=0, batch_size=batch_size)))
    assert [result.error is None for result in results] == [True, False, True, False, True]
    assert str(results[1].error) == f"{white.path}: cannot be used (IndexError: odd tensor)"
    assert "not finite" in str(results[3].error)


def test_whatever_a_loader_raises_is_the_failure_of_its_medium(
    pictures: list[MediaItem],
) -> None:
    def load(source: Any, *rest: Any) -> Any:
        if source.name == pictures[1].path:
            raise OverflowError("duration")
        return read(source, *rest)

    encoder: Any = FakeEncoder()
    encoder.read = load
    results = list(encode_items(pictures[:3], encoder, options(workers=2, batch_size=2)))
    assert [result.error is None for result in results] == [True, False, True]
    assert "01.png: cannot be used (OverflowError: duration)" in str(results[1].error)


def test_a_broken_encoder_and_a_full_gpu_end_the_work(pictures: list[MediaItem]) -> None:
    for error in (WeightsError("no such tower"), torch.OutOfMemoryError("CUDA out of memory")):

        class Broken(FakeEncoder):
            def embed(self, media: list[Any], *, normalize: bool) -> torch.Tensor:
                raise error  # noqa: B023

        encoder: Any = Broken()
        with pytest.raises(type(error)):
            list(encode_items(pictures, encoder, options(workers=1, batch_size=2)))


def test_the_work_may_be_ended_in_any_thread(pictures: list[MediaItem]) -> None:
    """Python ends a generator where its last reference is dropped: in a decoding thread, once."""
    encoder: Any = FakeEncoder()
    results: Any = encode_items(iter(pictures * 20), encoder, options(workers=2, batch_size=1))
    next(results)
    ending = threading.Thread(target=results.close)
    ending.start()
    ending.join(10)
    assert not ending.is_alive()
    assert results.gi_frame is None

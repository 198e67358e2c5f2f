"""Embeddings are found again by later runs, whatever else happens to the cache."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from chatbind_cli.data import embedding_cache
from chatbind_cli.data.lookup import Embeddings, open_parts
from chatbind_cli.data.media_items import MediaItem
from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.encoders.encoder import Encoder
from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.errors import ChatBindError
from chatbind_cli.files import lock_file
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.root import MediaRoot
from chatbind_cli.training.embeddings import encode_media
from tests.training.conftest import Counting
from tests.training.conftest import encoder as make_encoder

OPTIONS = MediaOptions()


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagebind")
    make_encoder(folder)
    return folder


@pytest.fixture
def media(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    folder.mkdir()
    for index in range(3):
        paint(folder / f"{index}.png", index)
    return folder


def paint(path: Path, colour: int, *, age_s: float = 60) -> None:
    Image.new("RGB", (20, 20), (colour * 40, 90, 200 - colour * 30)).save(path)
    os.utime(path, ns=(0, time.time_ns() - int(age_s * 1e9)))


class Run:
    """Runs of training, of which each encodes what is missing."""

    def __init__(self, weights: Path, folder: Path, cache: Path | None) -> None:
        self.weights, self.folder, self.cache = weights, folder, cache
        self.n = 0

    def __call__(self, media: Path, options: MediaOptions = OPTIONS, **more: Any) -> int:
        """How many media had to be encoded."""
        self.n += 1
        encoder = open_encoder(self.weights, **more)
        encoder.__class__ = Counting
        names = sorted(path.name for path in media.iterdir())
        wanted = [Medium("image", name) for name in names]
        part = self.folder / str(self.n) / "part-00000"
        failed = encode_media(wanted, encoder, MediaRoot(media), part, options, self.cache)
        assert not failed
        self.rows = Embeddings(open_parts(part.parent)).rows(wanted)
        return encoder.n_encoded  # type: ignore[no-any-return,attr-defined]


@pytest.fixture
def run(weights: Path, tmp_path: Path) -> Run:
    return Run(weights, tmp_path / "runs", tmp_path / "cache")


def test_the_next_run_encodes_nothing_and_reads_no_medium(run, media, monkeypatch) -> None:
    assert run(media) == 3
    first = run.rows
    monkeypatch.setattr("chatbind_cli.media.source.sha256_file", None)  # hashing would fail
    assert run(media) == 0
    assert torch.equal(run.rows, first)


def test_a_file_of_another_name_is_known_by_its_content(run, media, tmp_path) -> None:
    run(media)
    first = run.rows
    moved = tmp_path / "moved"
    shutil.copytree(media, moved)
    assert run(moved) == 0
    assert torch.equal(run.rows, first)


def test_a_changed_file_is_encoded_anew(run, media) -> None:
    run(media)
    before = run.rows
    paint(media / "1.png", 5, age_s=50)
    assert run(media) == 1
    assert [torch.equal(a, b) for a, b in zip(run.rows, before, strict=True)] == [True, False, True]


def test_a_file_that_may_still_change_is_looked_into(run, media) -> None:
    paint(media / "1.png", 1, age_s=0)
    stat = (media / "1.png").stat()
    run(media)
    before = run.rows
    size = stat.st_size
    Image.new("RGB", (20, 20), (41, 90, 170)).save(media / "1.png")
    assert (media / "1.png").stat().st_size == size, "the test needs contents of one length"
    os.utime(media / "1.png", ns=(0, stat.st_mtime_ns))  # written within a tick of the clock
    assert run(media) == 1
    assert not torch.equal(run.rows[1], before[1])


def test_another_dtype_or_preprocessing_is_another_embedding(run, media, weights) -> None:
    run(media)
    assert run(media, dtype=torch.bfloat16) == 3
    assert run(media, dtype=torch.bfloat16) == 0
    other = EmbeddingStore.open(next(run.cache.glob("*-float32")))
    assert {made for _, made in other.kinds()} == {OPTIONS.fingerprint("image")}


def test_without_a_cache_all_is_encoded_each_time(run, media) -> None:
    run.cache = None
    assert run(media) == run(media) == 3


Harm = Callable[[Path], None]


def _unreadable(cache: Path) -> None:
    [store] = cache.glob("*/embeddings.sqlite")
    store.write_bytes(b"SQLite format 3\0" + bytes(5000))


def _no_folder(cache: Path) -> None:
    shutil.rmtree(cache)
    cache.write_text("")


def _of_somebody_else(cache: Path) -> None:
    [store] = cache.glob("*/embeddings.sqlite")
    for file in store.parent.iterdir():
        file.unlink()
    (store.parent / "thesis.tex").write_text("")


@pytest.mark.parametrize("harm", [_unreadable, _no_folder, _of_somebody_else])
def test_a_cache_that_cannot_be_used_stops_no_run(
    harm: Harm, run, media, capfd, monkeypatch
) -> None:
    monkeypatch.setattr(embedding_cache, "_PATIENCE_S", 0.0)
    run(media)
    harm(run.cache)
    assert run(media) == 3
    said = capfd.readouterr().err
    assert said.count("the cache of embeddings is not used") == 1


def test_a_full_disk_stops_no_run(run, media, capfd, monkeypatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedding_cache, "writable_store", full)
    assert run(media) == 3
    assert "No space left" in capfd.readouterr().err


def test_runs_take_turns_in_writing(run, media, monkeypatch) -> None:
    """One that cannot write at once keeps what it has until the other is done."""
    run(media)
    paint(media / "3.png", 3)
    [folder] = run.cache.iterdir()
    with (folder / "writer.lock").open("ab") as held:
        lock_file(held.fileno(), folder)
        slept: list[float] = []

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            held.close()

        monkeypatch.setattr(embedding_cache.time, "sleep", sleep)
        assert run(media) == 1
    assert slept
    assert run(media) == 0


def test_a_writer_that_never_ends_is_not_waited_for(run, media, monkeypatch, capfd) -> None:
    run(media)
    paint(media / "3.png", 3)
    [folder] = run.cache.iterdir()
    monkeypatch.setattr(embedding_cache, "_PATIENCE_S", 0.2)
    with (folder / "writer.lock").open("ab") as held:
        lock_file(held.fileno(), folder)
        assert run(media) == 1
    assert "another process is writing" in capfd.readouterr().err
    assert run(media) == 1


def test_what_was_encoded_before_a_failure_is_kept(run, media, weights, monkeypatch) -> None:
    def embed(self, some, *, normalize):  # type: ignore[no-untyped-def]
        if self.n_encoded == 2:
            raise ChatBindError("the GPU is gone")
        self.n_encoded += len(some)
        return Encoder.embed(self, some, normalize=normalize)

    with monkeypatch.context() as patched, pytest.raises(ChatBindError, match="GPU is gone"):
        patched.setattr(Counting, "embed", embed)
        run(media)
    assert run(media) == 1


def test_a_file_is_the_one_that_the_media_root_means(run, media, tmp_path) -> None:
    """With a prefix, a record's name is that of another file, which may be there, too."""
    for index in range(3):
        paint(media / f"COCO_{index}.png", index + 3)
    root = MediaRoot(media, prefix="COCO_")
    encoder = open_encoder(run.weights)
    item = MediaItem(Medium("image", "1.png"), root, "1.png")
    for name in ("first", "second"):
        part = tmp_path / name / "part-00000"
        assert not encode_media([item.medium], encoder, root, part, OPTIONS, run.cache)
    [row] = open_parts(tmp_path / "second")
    assert run(media) == 5  # all but the one that was meant
    assert torch.equal(row.get("image", name="1.png"), run.rows[4])

"""Decoding in processes: the same tensors, and a crash is one failed record."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from PIL import Image

from chatbind_cli.data.decoders import Decoders, Reading, decode
from chatbind_cli.data.encoding import EncodingOptions, encode_items
from chatbind_cli.data.media_items import MediaItem
from chatbind_cli.encoders.encoder import Decoded
from chatbind_cli.encoders.imagebind.preprocess import read
from chatbind_cli.errors import MediaError
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.options import MediaOptions
from tests.data.test_encoding import FakeEncoder

OPTIONS = MediaOptions()
READING = Reading(("image",), read, OPTIONS)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[MediaItem]:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(4):
        Image.new("L", (8, 8), 20 * i).save(folder / f"{i}.png")
    (folder / "4.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return [MediaItem(Medium(None, path), name=path.name) for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def in_processes() -> Iterator[Decoders]:
    with closing(Decoders(READING, None)) as made:
        yield made


def test_tensors_and_errors_are_those_of_the_thread(
    items: list[MediaItem], in_processes: Decoders
) -> None:
    for item in items:
        here = decode(item.medium, item.open, READING)
        there = in_processes(item)
        if isinstance(here, Decoded):
            assert isinstance(there, Decoded)
            assert torch.equal(there.tensor, here.tensor)
            assert there.modality == here.modality
            assert there.source.name == here.source.name
            assert there.source.sha256 == here.source.sha256
        else:
            assert type(there) is type(here) and str(there) == str(here)


def test_what_is_known_already_is_not_decoded(items: list[MediaItem]) -> None:
    asked = []

    def recall(modality: str, sha256: str) -> torch.Tensor | None:
        asked.append((modality, len(sha256)))
        return torch.tensor([1.5]) if len(asked) == 1 else None

    with closing(Decoders(READING, recall)) as made:
        first, second = made(items[0]), made(items[1])
    assert isinstance(first, Medium) and first.embedding is not None
    assert first.embedding.tolist() == [1.5] and first.modality == "image"
    assert isinstance(second, Decoded)
    assert asked == [("image", 64)] * 2


def _child(made: Decoders) -> int:
    [process] = made._all
    pid = process._process.pid
    assert pid is not None
    return pid


def test_a_crash_is_an_error_of_one_item_alone(items: list[MediaItem], tmp_path: Path) -> None:
    fifo = MediaItem(Medium("image", tmp_path / "fifo"), name="fifo")
    os.mkfifo(tmp_path / "fifo")  # reading it takes until somebody writes
    with closing(Decoders(READING, None)) as made:
        assert isinstance(made(items[0]), Decoded)
        child = _child(made)
        threading.Timer(0.3, os.kill, (child, signal.SIGSEGV)).start()
        found = made(fifo)
        assert isinstance(found, MediaError)
        assert "crashed what decodes it (SIGSEGV)" in str(found) and "fifo" in str(found)
        assert isinstance(made(items[1]), Decoded)
        assert _child(made) != child


def test_one_that_was_killed_while_idle_costs_no_item(items: list[MediaItem]) -> None:
    with closing(Decoders(READING, None)) as made:
        made(items[0])
        os.kill(_child(made), signal.SIGKILL)
        end = time.monotonic() + 5
        while any(process.is_alive() for process in made._all) and time.monotonic() < end:
            time.sleep(0.01)
        assert isinstance(made(items[1]), Decoded)


def test_a_few_media_start_no_process(items: list[MediaItem]) -> None:
    with closing(Decoders(READING, None, few=2)) as made:
        for item in items[:2]:
            assert isinstance(made(item), Decoded)
        assert not made._all


def test_no_process_is_left_when_the_work_is_given_up(items: list[MediaItem]) -> None:
    with closing(Decoders(READING, None)) as made:
        made(items[0])
        [process] = made._all
    process._process.join(10)
    assert not process.is_alive()


def test_items_are_encoded_alike_wherever_they_are_decoded(items: list[MediaItem]) -> None:
    encoder = FakeEncoder()

    def rows(where: str) -> list[float | str]:
        how = EncodingOptions(media=OPTIONS, workers=2, batch_size=3, decode_in=where)  # type: ignore[arg-type]
        return [
            str(r.error) if r.medium.embedding is None else float(r.medium.embedding)
            for r in encode_items(iter(items), encoder, how)  # type: ignore[arg-type]
        ]

    assert rows("processes") == rows("threads")

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest

from chatbind_cli.encoders.imagebind.preprocess import load_media
from chatbind_cli.errors import MediaError

Maker = Callable[..., bytes]


def with_count(data: bytes, kind: bytes, at: int, *numbers: int) -> bytes:
    """A file with numbers of one of its boxes replaced, `at` bytes behind the name."""
    start = data.index(kind) + len(kind) + at
    packed = struct.pack(f">{len(numbers)}I", *numbers)
    return data[:start] + packed + data[start + len(packed) :]


def test_a_small_file_cannot_state_millions_of_samples(film: Maker) -> None:
    data = film(frames=10)
    data = with_count(data, b"stsz", 4, 1, 20_000_000)
    data = with_count(data, b"stsc", 12, 20_000_000)
    data = with_count(data, b"stts", 8, 20_000_000)
    with pytest.raises(MediaError, match="more than 3,000,000 samples"):
        load_media(data)


def test_hours_of_plain_sound_are_not_listed_and_are_read(sound: Maker) -> None:
    data = sound("mov", "pcm_s16le", samples=np.zeros(16_000), rate=16_000)
    data = with_count(data, b"stsz", 8, 2_000_000_000)
    assert load_media(data).modality == "audio"


def test_compressed_tables_are_refused(film: Maker) -> None:
    data = film(frames=10)
    with pytest.raises(MediaError, match="compressed tables"):
        load_media(data.replace(b"mvhd", b"cmov"))

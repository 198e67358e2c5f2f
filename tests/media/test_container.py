from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest

from chatbind_cli.encoders.imagebind.preprocess import load_media
from chatbind_cli.errors import MediaError
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import open_source
from chatbind_cli.media.video import read_frames

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


@pytest.mark.parametrize(
    ("box", "codec", "gop"),
    [
        ("mpegts", "libx264", 12),
        ("mpegts", "libx264", 250),
        ("mpeg", "mpeg2video", 12),
        ("flv", "libx264", 25),
    ],
)
def test_frames_are_found_where_no_index_says_at_which_ones_decoding_can_begin(
    film: Maker, box: str, codec: str, gop: int
) -> None:
    data = film(box, codec, frames=200, rate=25, gop=gop)
    chosen = np.linspace(0, 199, 5).astype(int)  # far enough from each other for jumps
    shown = read_frames(
        open_source(data), MediaOptions(), lambda *_: chosen, lambda rgb: float(rgb.mean())
    )
    away = (np.array(shown) - 5 * chosen + 128) % 256 - 128
    # the next frame is 5 levels away: MPEG's program stream has one stamp for several small frames
    assert np.abs(away).max() < (7.45 if box == "mpeg" else 2.45)

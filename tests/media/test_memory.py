"""What a decode really takes, measured in a process of its own."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from chatbind_cli.encoders.imagebind.preprocess import load_media
from chatbind_cli.errors import MediaError
from chatbind_cli.media import tables
from chatbind_cli.media.guard import ONE_BYTES
from tests.recordings import image_file

Maker = Callable[..., bytes]

MEASURE = """
import sys
from chatbind_cli.errors import MediaError
from chatbind_cli.encoders.imagebind import audio, imu, planes, vision
from chatbind_cli.media import video
from chatbind_cli.encoders.imagebind.preprocess import load_media

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

for path in sys.argv[1:]:
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
    before = status("VmRSS")
    try:
        said = load_media(path).modality
    except MediaError as error:
        said = str(error).replace(chr(10), " ")
    print(status("VmHWM") - before, said, flush=True)
"""


def png(width: int, height: int, *, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG of zeros, packed without ever being whole; of a strip only the head."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    packer = zlib.compressobj(1)
    row = bytes(1 + width * depth // 8 * (3 if colour == 2 else 1))
    body = b"".join(packer.compress(row) for _ in range(min(height, 10_000))) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def large_webp() -> bytes:
    """A canvas of 15,999 x 15,999 with a picture of 8 x 8 on it."""
    frames = [Image.new("RGBA", (8, 8), (shade, 2, 3, 4)) for shade in (1, 9)]
    content = bytearray(image_file(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    content[24:30] = (15_998).to_bytes(3, "little") * 2
    return bytes(content)


def long_gif(frames: int) -> bytes:
    """Thousands of frames of a pixel on a screen of 9000 x 9000."""
    parts = []
    for size in (9000, 1):
        picture = Image.new("P", (size, size), 1)
        picture.putpalette(list(range(256)) * 3)
        parts.append(image_file(picture, "GIF"))
    first, pixel = parts
    frame = pixel[pixel.index(b"\x2c\0\0\0\0\1\0\1\0") : -1]
    return first[:-1] + (b"\x21\xf9\x04\0\x0a\0\0\0" + frame) * frames + b";"


def test_no_file_takes_more_than_the_budget(tmp_path: Path, film: Maker) -> None:
    photo = Image.new("RGB", (10_000, 10_000), (200, 30, 90))
    files = {
        "100 megapixels.jpg": (image_file(photo, "JPEG"), "image"),
        "52 megapixels.png": (png(8660, 6000, colour=2), "image"),
        "strip.png": (png(1, 89_478_485), "would take"),
        "depth.png": (png(4200, 4200, depth=16), "holds no measured depth"),
        "large depth.png": (png(9000, 9000, depth=16), "would take"),
        "canvas.webp": (large_webp(), "would take"),
        "screen.gif": (long_gif(3000), "would take"),
        "film.avi": (
            film("avi", "mjpeg", frames=1, pixels="yuvj420p", size=(5600, 5600)),
            "video",
        ),
    }
    for name, (content, _) in files.items():
        (tmp_path / name).write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *[str(tmp_path / name) for name in files]],
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(files), done.stderr
    for line, (name, (_, said)) in zip(lines, files.items(), strict=True):
        taken, _, answer = line.partition(" ")
        assert said in answer, name
        assert int(taken) < ONE_BYTES, (name, line)


def test_a_photo_of_many_scans_is_refused() -> None:
    photo = image_file(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
    scan = photo[photo.rindex(b"\xff\xda") : -2]
    assert load_media(photo[:-2] + scan * 3 + b"\xff\xd9").modality == "image"
    with pytest.raises(MediaError, match="more than 200 scans"):
        load_media(photo[:-2] + scan * 300 + b"\xff\xd9")


def test_a_photo_beyond_the_budget_shows_what_a_small_one_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    across = np.broadcast_to(np.linspace(0, 255, 1600), (1600, 1600))
    rgb = np.stack([across, across.T, across], axis=-1).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    photo = image_file(rgb, "JPEG", exif=exif)
    whole = load_media(photo).tensor
    monkeypatch.setattr("chatbind_cli.media.pictures.ONE_BYTES", 20 * 2**20)
    small = load_media(photo).tensor
    assert not torch.equal(small, whole)
    assert (small - whole).abs().max() < 0.1  # values reach 2.7; one level is 0.015


def test_a_page_that_unpacks_to_more_than_any_is_refused() -> None:
    names = ["ax", "ay", "az", "gx", "gy", "gz"]
    zeros = pa.array(np.zeros(3_000_000))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(
        pa.table(dict.fromkeys(names, zeros)),
        buffer,
        use_dictionary=False,
        compression="zstd",
        data_page_size=2**30,
        row_group_size=3_000_000,
        max_rows_per_page=3_000_000,
    )
    content = buffer.getvalue()
    # the footer says 1,000 rows and 100 bytes
    meta = pyarrow.parquet.ParquetFile(buffer).metadata
    at = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    footer = content[at:]
    lies = {3_000_000: 1_000, meta.row_group(0).total_byte_size: 100}
    lies |= {meta.row_group(0).column(i).total_uncompressed_size: 100 for i in range(6)}
    for true, lie in lies.items():
        footer = footer.replace(varint(true), varint(lie, len(varint(true))))
    with pytest.raises(MediaError, match="larger pages than any table"):
        load_media(content[:at] + footer)


def varint(value: int, length: int = 0) -> bytes:
    """A whole number as Thrift writes it, made longer if need be."""
    value <<= 1
    out = []
    while value or len(out) < max(length, 1):
        out.append(value & 127 | 128)
        value >>= 7
    out[-1] &= 127
    return bytes(out)


@pytest.mark.parametrize("inner", [1, 2, 3, 5, 7, 8, 9, 12])
def test_a_list_in_a_page_header_ends_with_the_header(inner: int) -> None:
    endless = b"\xff" * 9 + b"\x01"  # so many elements, of which none come
    header = io.BytesIO(bytes([0x19, 0xF0 | inner]) + endless)
    with pytest.raises(ValueError, match="page header"):
        tables._thrift_struct(header, 0)

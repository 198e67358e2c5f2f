"""Mutants of media: bytes, chunks, header fields, bombs; all from a given generator.

Knows how the containers are built (PNG, RIFF, IFF, ISO-BMFF), so that a change is not only found
out by a check sum or a length; nothing of the program that is to read them.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fuzzing.seeds import film, png_chunk, saved, sound

Span = tuple[int, int]

EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
             1 << 31, 1 << 62, (1 << 63) - 1, (1 << 64) - 1, 65_500, 20_000, 1_000_000)  # fmt: skip


# ---- bytes


def _flip(data: bytearray, r: random.Random) -> None:
    # one to a few hundred, mostly where headers are
    for _ in range(r.choice((1, 1, 3, 20, 200))):
        end = r.choice((64, 512, len(data)))
        data[r.randrange(min(end, len(data)))] ^= 1 << r.randrange(8)


def _overwrite(data: bytearray, r: random.Random) -> None:
    start = r.randrange(len(data))
    count = r.choice((1, 4, 16, 256))
    filler = r.choice((b"\0", b"\xff", None))
    data[start : start + count] = filler * count if filler else r.randbytes(count)


def _truncate(data: bytearray, r: random.Random) -> None:
    del data[int(len(data) * r.random() ** r.choice((0.2, 1, 4))) :]


def _insert(data: bytearray, r: random.Random) -> None:
    start = r.randrange(len(data) + 1)
    data[start:start] = r.randbytes(r.choice((1, 3, 64, 5000)))


def _extreme(data: bytearray, r: random.Random) -> None:
    """A number of 16, 32 or 64 bits in the header becomes an extreme one."""
    width, order = r.choice((2, 4, 4, 8)), r.choice("<>")
    value = r.choice(EXTREMES) & ((1 << 8 * width) - 1)
    spot = r.randrange(min(len(data), r.choice((48, 256, 4096)))) // 2 * 2
    data[spot : spot + width] = struct.pack(order + {2: "H", 4: "I", 8: "Q"}[width], value)


def _trifle(data: bytearray, r: random.Random) -> None:
    """Nothing, one byte, text, a magic alone."""
    data[:] = r.choice((b"", data[:1], data[:8], b"\0" * 4096, b"hello\n", b"{}", b"<html>",
                        b"1,2,3,4,5,6\n" * 20, b"\xff\xfe" * 100))  # fmt: skip


# ---- chunks


def chunks(data: bytes) -> list[Span]:
    """Where the parts of a container begin and end; empty for a format without such parts."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _walk(data, 8, len(data), lambda at: 12 + int.from_bytes(data[at : at + 4], "big"))
    if data[:4] in (b"RIFF", b"FORM"):
        order = "little" if data[:4] == b"RIFF" else "big"

        def size(at: int) -> int:  # even
            return 8 + (int.from_bytes(data[at + 4 : at + 8], order) + 1) // 2 * 2

        return _walk(data, 12, len(data), size)
    if data[4:8] in (b"ftyp", b"moov", b"wide", b"mdat"):
        return _boxes(data, 0, len(data))
    mark = {b"OggS": b"OggS", b"\x1a\x45\xdf\xa3": b"\x1f\x43\xb6\x75", b"\xff\xd8\xff": b"\xff",
            b"GIF8": b"\x21\xf9\x04", b"G@\0\x11": b"G"}  # fmt: skip
    for head, between in mark.items():
        if data.startswith(head):
            places = [at for at in range(len(data)) if data.startswith(between, at)][:400]
            return list(zip(places, [*places[1:], len(data)], strict=False))
    return []


def _walk(data: bytes, at: int, end: int, size: Callable[[int], int]) -> list[Span]:
    spans = []
    while at + 8 <= end:
        spans.append((at, min(at + size(at), end)))
        at = spans[-1][1]
    return spans


def _boxes(data: bytes, at: int, end: int) -> list[Span]:
    spans = []
    for start, stop in _walk(
        data, at, end, lambda at: max(int.from_bytes(data[at : at + 4], "big"), 8)
    ):
        spans.append((start, stop))
        if data[start + 4 : start + 8] in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"meta"):
            spans += _boxes(data, start + 8 + 4 * (data[start + 4 : start + 8] == b"meta"), stop)
    return spans


def _repair(data: bytearray) -> None:
    """Makes the check sums of a PNG right again, so that its readers look further."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        for start, stop in chunks(bytes(data)):
            if stop - start >= 12:
                data[stop - 4 : stop] = struct.pack(">I", zlib.crc32(data[start + 4 : stop - 4]))


def _chunk(data: bytearray, r: random.Random) -> None:
    """A chunk is doubled, removed, moved, or holds extreme numbers."""
    spans = chunks(bytes(data))
    if not spans:
        _extreme(data, r)
        return
    (start, stop), what = r.choice(spans), r.randrange(7)
    part = data[start:stop]
    if what == 0:
        data[stop:stop] = part * r.choice((1, 1, 300))
    elif what == 1:
        del data[start:stop]
    elif what == 2:
        del data[start:stop]
        data[(to := r.choice(spans)[0]) : to] = part
    else:
        # a size, or a number in the content
        at = start if what == 3 else start + 2 * r.randrange(1 + min(stop - start, 96) // 2)
        width, order = r.choice((2, 4, 4, 8)), r.choice("><")
        value = r.choice(EXTREMES) & ((1 << 8 * width) - 1)
        data[at : at + width] = value.to_bytes(width, "big" if order == ">" else "little")
    if r.random() < 0.7:
        _repair(data)


_BYTE_WAYS = (*[_flip] * 2, _overwrite, _truncate, _insert, *[_extreme] * 2, *[_chunk] * 3)


def mutate(good: bytes, other: bytes, r: random.Random) -> bytes:
    """One mutant of a file; `other` is what it may be spliced with."""
    data = bytearray(good)
    dice = r.random()
    if dice < 0.04:
        _trifle(data, r)
    elif dice < 0.1:
        cut = r.random()
        data = data[: int(len(data) * cut)] + other[int(len(other) * r.random()) :]
    else:
        for _ in range(r.choice((1, 1, 1, 2, 4))):
            if len(data) > 1:
                r.choice(_BYTE_WAYS)(data, r)
        if r.random() < 0.8:
            _repair(data)
    return bytes(data)


# ---- bombs: little content that says it is much, or becomes much


def _npy_header(r: random.Random) -> bytes:
    shape = r.choice(("(1000000000, 6)", "(6, 4611686018427387904)", "(" + "1," * 40 + ")",
                      "(" + "1," * 31 + "6, 20)", "(6, " + "9" * 4300 + ")", "(6, -20)",
                      "(True, 6)", "(6, 1e9)", "(" * 200 + ")" * 200, "(6, 20), 'x': [0]*10**9",
                      "(6,0)", "(0x6, 0b11)"))  # fmt: skip
    kind = r.choice(("<f8", "<f4", "|O", "<U9", "<f16", "<c8", "<M8[ns]", "f8, i4", "|V8", "<i8"))
    order = r.choice(("True", "False", "2"))
    text = f"{{'descr': '{kind}', 'fortran_order': {order}, 'shape': {shape}}}"
    head = text.encode().ljust(118 if len(text) < 118 else len(text) + 9) + b"\n"
    return b"\x93NUMPY\x02\0" + struct.pack("<I", len(head)) + head + r.randbytes(960)


def _png_bomb(r: random.Random) -> bytes:
    width, height = r.choice(((1, 89_478_485), (9_400, 9_400), (30_000, 2_900), (65_535, 65_535),
                              (1 << 31, 1), (89_478_485, 1)))  # fmt: skip
    bits, colour, pixel = r.choice(((8, 2, 3), (16, 0, 2), (8, 6, 4), (16, 6, 8), (1, 0, 1)))
    squeeze = zlib.compressobj(1)
    total, data = min((width * pixel + 1) * height, 800 << 20), b""
    if r.random() < 0.7:  # else: declared and missing
        rows = (squeeze.compress(bytes(1 << 22)) for _ in range(-(-total >> 22)))
        data = b"".join(rows) + squeeze.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, r.randrange(2))
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", data)
        + png_chunk(b"IEND", b"")
    )


def _gif_bomb(r: random.Random) -> bytes:
    side, frames = r.choice(((9_000, 3_000), (65_535, 2), (4_000, 400), (300, 20_000)))
    screen = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(6)
    small = r.choice((1, side))
    frame = b"\x21\xf9\x04\0\x02\0\0\0\x2c" + struct.pack("<HHHHB", 0, 0, small, small, 0)
    return screen + (frame + b"\x02\x02\x44\x01\0") * frames + b"\x3b"


def _big_picture(kind: str, **options: Any) -> Callable[[random.Random], bytes]:
    def make(r: random.Random) -> bytes:
        width, height = r.choice(((8_000, 8_000), (16_000, 700), (700, 16_000)))
        mode = r.choice(("L", "RGB")) if kind != "WEBP" else "RGB"
        return saved(Image.new(mode, (width, height), 7), kind, **options)

    return make


def _tiff_bomb(r: random.Random) -> bytes:
    picture = Image.new(r.choice(("RGB", "F", "I;16", "L")), (9_000, 8_000))
    return saved(picture, "TIFF", compression="tiff_adobe_deflate")


def _declared(head: bytes, spot: int, form: str) -> Callable[[random.Random], bytes]:
    """A header with a width and height of its own choice, and nothing after it."""

    def make(r: random.Random) -> bytes:
        sides = r.choice(((9_400, 9_400), (65_000, 65_000), (1, 32_000), (32_767, 2_700)))
        data = bytearray(head)
        data[spot : spot + struct.calcsize(form)] = struct.pack(form, *sides)
        return bytes(data) + r.randbytes(300)

    return make


def _film_bomb(
    container: str, codec: str, pixels: str = "yuv420p"
) -> Callable[[random.Random], bytes]:
    def make(r: random.Random) -> bytes:
        size, frames = r.choice(
            (((8_192, 8_192), 2), ((4_096, 4_096), 3), ((16_000, 32), 4), ((32, 32), 4_000))
        )
        if codec == "mpeg4" and size[0] > 8_190:
            size = (8_160, 8_160)
        plain = np.zeros((size[1], size[0], 3), np.uint8)
        how: dict[str, Any] = {"frames": frames, "size": size, "pixels": pixels, "gop": 1000}
        return film(container, codec, draw=lambda _: plain, **how)

    return make


def _silence(container: str, codec: str) -> Callable[[random.Random], bytes]:
    def make(r: random.Random) -> bytes:
        seconds = r.choice((200, 2_000))
        data = sound(container, codec, samples=np.zeros(seconds * 8_000), rate=8_000)
        if container == "wav":
            spot = data.index(b"fmt ") + r.choice((10, 12, 16, 20, 22))
            value = struct.pack("<I", r.choice(EXTREMES) & 0xFFFFFFFF)
            data = data[:spot] + value + data[spot + 4 :]
        return data

    return make


def _parquet_bomb(r: random.Random) -> bytes:
    """A hundred million equal numbers in a few kilobytes; sometimes the footer denies it."""
    names = ("acc_x", "acc_y", "acc_z", "gyro_x", "gyro_y", "gyro_z")
    table = pa.table({name: pa.array([1.5] * 1_000_000) for name in names})
    buffer = io.BytesIO()
    rows = r.choice((3, 20))
    with pq.ParquetWriter(buffer, table.schema, compression="zstd") as writer:
        for _ in range(rows):
            writer.write_table(table)
    data = bytearray(buffer.getvalue())
    if r.random() < 0.6:
        for _ in range(r.choice((1, 3, 9))):
            data[r.randrange(len(data) - 900, len(data) - 8)] ^= 1 << r.randrange(8)
    return bytes(data)


_HEADER = b"timestamp,acc_x,acc_y,acc_z,gyro_x,gyro_y,gyro_z\n"


def _table_bomb(r: random.Random) -> bytes:
    return r.choice((
        b"1,2,3,4,5,6," * 400_000,
        _HEADER + b"1,2,3,4,5,6,7\n" * 900_000,
        _HEADER + b"0,1e308,-1e308,nan,inf,6,7\n" * 50,
        b"acc_x," * 3_000 + b"\n" + b"1," * 3_000,
        b"1,2,3,4,5," + b"9" * 2_000_000 + b"\n",
        b'"1,2,3,4,5,6\n' * 20_000,
        b"\n" * 3_000_000 + b"1,2,3,4,5,6\n",
    ))  # fmt: skip


def _ppm_bomb(r: random.Random) -> bytes:
    head = r.choice((
        b"P6 9000 9000 255\n", b"P5 1 89478485 65535\n", b"P4 " + b"9" * 5_000 + b" 1\n",
        b"P6\n#" + b"x" * 900_000, b"P3 9000 9000 255\n1 ",
    ))  # fmt: skip
    return head + b"7" * 900


_JPEG = saved(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
_WAYS: dict[str, tuple[Callable[[random.Random], bytes], ...]] = {
    "png": (_png_bomb,), "depth-png": (_png_bomb,), "thermal-png": (_png_bomb,),
    "gif": (_gif_bomb,), "film-gif": (_gif_bomb,),
    "webp": (_big_picture("WEBP", lossless=True, quality=0, method=0),),
    "jpeg": (_declared(_JPEG, _JPEG.index(b"\xff\xc2") + 5, ">HH"),
             _big_picture("JPEG", progressive=True)),
    "bmp": (_declared(saved(Image.new("RGB", (9, 9)), "BMP"), 18, "<ii"),),
    "ppm": (_ppm_bomb,),
    "jp2": (_big_picture("JPEG2000"),),
    "tiff": (_tiff_bomb,), "depth-tiff": (_tiff_bomb,), "thermal-tiff": (_tiff_bomb,),
    "avif": (_big_picture("AVIF", speed=10),),
    "wav": (_silence("wav", "pcm_u8"),), "flac": (_silence("flac", "flac"),),
    "mp4": (_film_bomb("mp4", "mpeg4"),), "avi": (_film_bomb("avi", "mjpeg", "yuvj420p"),),
    "mkv": (_film_bomb("matroska", "mpeg4"),), "webm": (_film_bomb("webm", "libvpx"),),
    "mov": (_film_bomb("mov", "qtrle", "rgb24"),),
    "depth-npy": (_npy_header,), "imu-npy": (_npy_header,),
    "imu-parquet": (_parquet_bomb,), "imu-csv": (_table_bomb,),
}  # fmt: skip


def bomb(kind: str, r: random.Random) -> bytes | None:
    """A bomb of a format of media, where there is one."""
    ways = _WAYS.get(kind)
    return r.choice(ways)(r) if ways else None

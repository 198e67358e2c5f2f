"""Still pictures from bytes: photographs and drawings in colour, and maps of one number a pixel.

What the pixels mean (colour, distance, heat), and at which size they are looked at, is the
encoder's business.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError

from chatbind_cli.errors import MediaError
from chatbind_cli.media.guard import ONE_BYTES, Timed, decoding, reading
from chatbind_cli.media.source import MediaSource

# Named, because Pillow also has formats that start other programs (EPS) or read other files.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "PPM", "JPEG2000")

_LARGEST_FILE = 2**30

_HEADER_BYTES = 16 * 2**20
"""Most that is read of a file before its size in pixels is known."""

MAP_WORK = 32
"""Bytes for each pixel in the calculations with a map of depth or heat, its float32 included."""

_BASE_BYTES = 8 * 2**20

_PIXEL_BYTES = 12
"""Most that Pillow's readers were measured to take a pixel, with the way to upright RGB."""

_MORE_BYTES = {"WEBP": 16, "AVIF": 16, "PPM": 16, "JPEG2000": 28}
"""The same for formats whose readers take more."""

_WIDE_BYTES = 28
"""The same for numbers of 32 bits."""

_COEFFICIENT_BYTES = 8
"""What libjpeg keeps a pixel of a JPEG in several scans, however small it is to become."""

_MOST_SCANS = 200
"""A progressive JPEG has about ten; each costs as much time as the whole picture."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation."""

T = TypeVar("T")


def open_rgb(
    source: MediaSource, max_pixels: int, *, work: int = 0
) -> AbstractContextManager[Image.Image]:
    """The first frame of a picture in three channels of 8 bits, the way up its EXIF data say.

    JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF, PPM, JPEG 2000; grey, palette, CMYK and 16-bit pictures
    become RGB; transparency is dropped, as ImageBind does. A JPEG that would not fit the budget in
    full size is decoded at half, a quarter or an eighth of it. Inside the block there is room for
    `work` bytes a pixel.

    Raises:
        MediaError: it is not a picture, broken, larger than `max_pixels`, or its decoding would
            take more than the budget allows.
    """
    return _decoded(source, max_pixels, lambda picture: _upright(picture, _to_rgb(picture)), work)


def open_one_channel(
    source: MediaSource, max_pixels: int
) -> AbstractContextManager[npt.NDArray[np.generic]]:
    """The pixels of a one-channel picture in their own type, or of any other in luminance, 8 bit.

    Returns:
        [height, width] of uint8, uint16, int32 or float32.

    Raises:
        MediaError: see `open_rgb`.
    """

    def convert(picture: Image.Image) -> npt.NDArray[np.generic]:
        one = picture.mode == "L" or _is_measured(picture)
        values = np.asarray(_upright(picture, picture if one else _to_rgb(picture).convert("L")))
        return values.astype(np.uint16) if picture.mode.startswith("I;16") else values

    return _decoded(source, max_pixels, convert, MAP_WORK)


def is_measurement(source: MediaSource) -> bool:
    """Whether a picture has one channel of more than 8 bits; False for what cannot be opened."""
    with source.open() as stream:
        try:
            return _is_measured(_opened(Timed(stream, left=_HEADER_BYTES)))
        except Exception:
            return False  # the loader of pictures says what is wrong


@contextmanager
def _decoded(
    source: MediaSource, max_pixels: int, convert: Callable[[Image.Image], T], work: int
) -> Iterator[T]:
    """What `convert` makes of a decoded picture, with room for the work on it.

    Args:
        source: a file of one of the formats above.
        max_pixels: most pixels that its header may state.
        convert: takes the picture.
        work: bytes that the caller needs for each pixel.
    """
    if source.size > _LARGEST_FILE:
        raise MediaError("is larger than 1 GiB, as no picture is", where=source.name)
    with source.open() as stream, ExitStack() as room:
        with reading(source.name, "is a broken picture"):
            limited = Timed(stream, left=_HEADER_BYTES)
            webp = _webp_pixels(source)
            if webp is not None:  # its reader takes the memory for the pixels when it is opened
                limited.left = None
                cost = _BASE_BYTES + 2 * source.size + webp * _MORE_BYTES["WEBP"]
                room.enter_context(decoding(cost, source.name))
            try:
                picture = _opened(limited)
            except UnidentifiedImageError as error:
                raise MediaError("is not a picture that can be read", where=source.name) from error
            except Image.DecompressionBombError as error:
                raise _too_many_pixels(source, max_pixels) from error
            if picture.width * picture.height > max_pixels:
                raise _too_many_pixels(source, max_pixels)
            if webp is None:
                room.enter_context(decoding(_fitted(picture, source, stream, work), source.name))
                limited.left = None
            with _without_warnings():
                picture.load()
                result = convert(picture)
            del picture  # before its room is given back
        try:
            yield result
        finally:
            del result


def _opened(stream: Timed) -> ImageFile.ImageFile:
    with _without_warnings():
        return Image.open(stream, formats=_FORMATS)  # type: ignore[arg-type]


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Pillow's warnings stay unsaid: odd metadata in a good picture, and sizes that we check."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _webp_pixels(source: MediaSource) -> int | None:
    """Pixels of a WebP file by its first bytes; None for other formats."""
    head = source.head(30)
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    if head[12:16] == b"VP8X":
        width, height = (1 + int.from_bytes(head[at : at + 3], "little") for at in (24, 27))
    elif head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    return width * height


def _fitted(picture: ImageFile.ImageFile, source: MediaSource, stream: BinaryIO, work: int) -> int:
    """Bytes that decoding takes; a JPEG that is too large is told to become smaller on the way.

    Args:
        picture: opened, and not decoded yet.
        source: its file.
        stream: the file, where opening has left it.
        work: bytes that the caller needs for each pixel.

    Raises:
        ValueError: it has more scans than a picture has.
    """
    width, height = picture.size
    pixels = width * height
    reader = _MORE_BYTES.get(picture.format or "", _PIXEL_BYTES)
    wide = _WIDE_BYTES if picture.mode in ("I", "F") else 0
    each = max(reader, wide, work + 4)
    # rows have pointers, and readers hold a few of the longest possible ones
    fixed = _BASE_BYTES + 24 * width + 16 * height
    if picture.format in ("AVIF", "TIFF"):  # their readers hold the file
        fixed += 2 * source.size
    if picture.format == "TIFF":  # unpacked tile by tile, however large a tile may be
        tags = picture.tag_v2  # type: ignore[attr-defined]
        pixels = max(pixels, int(tags.get(322, 0)) * int(tags.get(323, 0)))
    if picture.format not in ("JPEG", "MPO"):
        return fixed + pixels * each
    if _scans(stream) > 1 or "progressive" in picture.info:
        fixed += pixels * _COEFFICIENT_BYTES
    for step in (1, 2, 4, 8):
        cost = fixed + pixels // step**2 * each
        if cost <= ONE_BYTES:
            break
    if step > 1:
        picture.draft(picture.mode, (width // step, height // step))
    return cost


def _scans(stream: BinaryIO) -> int:
    """How many scans a JPEG has, from behind the first one's head, where Pillow stops.

    Raises:
        ValueError: more than a picture has.
    """
    scans, last, ended = 1, b"", b""
    while not ended and (part := stream.read(1 << 20)):
        inside, ended, _ = (last + part).partition(b"\xff\xd9")
        scans += inside.count(b"\xff\xda")
        last = part[-1:]
    if scans > _MOST_SCANS:
        raise ValueError(f"more than {_MOST_SCANS} scans")
    return scans


def _is_measured(picture: Image.Image) -> bool:
    return picture.mode in ("I", "F") or picture.mode.startswith("I;16")


def _upright(original: Image.Image, picture: Image.Image) -> Image.Image:
    """The picture, turned as the EXIF data of the original say."""
    turn = _TURNS.get(original.getexif().get(_ORIENTATION, 1))
    return picture if turn is None else picture.transpose(turn)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        values = np.nan_to_num(np.asarray(picture), nan=0.0, posinf=255.0, neginf=0.0)
        scale = 255.0 if values.max(initial=0.0) <= 1.0 else 1.0
        picture = Image.fromarray(np.clip(values * scale, 0.0, 255.0).astype(np.uint8))
    elif _is_measured(picture):  # Pillow would cut the values at 255
        values = np.asarray(picture)
        values = values if picture.mode != "I" else np.clip(values, 0, 65535)
        picture = Image.fromarray((values >> 8).astype(np.uint8))
    elif picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _too_many_pixels(source: MediaSource, max_pixels: int) -> MediaError:
    return MediaError(
        f"has more than {max_pixels:,} pixels", where=source.name, hint="raise --max-pixels"
    )

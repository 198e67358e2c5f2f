"""Still pictures from bytes: photographs and drawings in colour, and maps of one number a pixel.

What the pixels mean (colour, distance, heat), and at which size they are looked at, is the
encoder's business.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError

from chatbind_cli.errors import MediaError
from chatbind_cli.media.guard import Timed, decoding, reading
from chatbind_cli.media.picture_cost import MAP_WORK, picture_plan, webp_plan
from chatbind_cli.media.source import MediaSource

# Named, because Pillow also has formats that start other programs (EPS) or read other files.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "PPM", "JPEG2000")

_LARGEST_FILE = 2**30

_HEADER_BYTES = 16 * 2**20
"""Most that is read of a file before its size in pixels is known."""

_STRIP_PIXELS = 2**20

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


def open_rgb(source: MediaSource, max_pixels: int) -> AbstractContextManager[Image.Image]:
    """The first frame of a picture in three channels of 8 bits, the way up its EXIF data say.

    JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF, PPM, JPEG 2000; grey, palette, CMYK and 16-bit pictures
    become RGB; transparency is dropped, as ImageBind does. A picture that would not fit the budget
    in full size is decoded at half, a quarter or an eighth of it, where the format can, and else
    averaged to that in strips.

    Raises:
        MediaError: it is not a picture, broken, larger than `max_pixels`, or its decoding would
            take more than the budget allows.
    """
    return _decoded(
        source, max_pixels, lambda picture, step: _upright(picture, _rgb(picture, step)), work=0
    )


def open_one_channel(
    source: MediaSource, max_pixels: int
) -> AbstractContextManager[npt.NDArray[np.generic]]:
    """The pixels of a one-channel picture in their own type, or of any other in luminance, 8 bit.

    Of a map that would not fit the budget, calculations included, every second, fourth or eighth
    pixel is taken, in both directions: a mean would mix readings with holes.

    Returns:
        [height, width] of uint8, uint16, int32 or float32.

    Raises:
        MediaError: see `open_rgb`.
    """

    def convert(picture: Image.Image, step: int) -> npt.NDArray[np.generic]:
        values = np.asarray(_upright(picture, _one_channel(picture, step)))
        return values.astype(np.uint16) if picture.mode.startswith("I;16") else values

    return _decoded(source, max_pixels, convert, work=MAP_WORK)


def is_measurement(source: MediaSource) -> bool:
    """Whether a picture has one channel of more than 8 bits; False for what cannot be opened."""
    with source.open() as stream:
        try:
            return _is_measured(_opened(Timed(stream, left=_HEADER_BYTES)))
        except Exception:
            return False  # the loader of pictures says what is wrong


@contextmanager
def _decoded(
    source: MediaSource, max_pixels: int, convert: Callable[[Image.Image, int], T], *, work: int
) -> Iterator[T]:
    """What `convert` makes of a decoded picture, with room for the work on it.

    Args:
        source: a file of one of the formats above.
        max_pixels: most pixels that its header may state.
        convert: takes the picture, and how many times smaller it has to make it.
        work: bytes that the caller needs for each pixel.
    """
    if source.size > _LARGEST_FILE:
        raise MediaError("is larger than 1 GiB, as no picture is", where=source.name)
    with source.open() as stream, ExitStack() as room:
        with reading(source.name, "is a broken picture"):
            limited = Timed(stream, left=_HEADER_BYTES)
            plan = webp_plan(source)
            if plan is not None:  # its reader takes the memory for the pixels when it is opened
                limited.left = None
                room.enter_context(decoding(plan.cost, source.name))
            try:
                picture = _opened(limited)
            except UnidentifiedImageError as error:
                raise MediaError("is not a picture that can be read", where=source.name) from error
            except Image.DecompressionBombError as error:
                raise _too_many_pixels(source, max_pixels) from error
            if picture.width * picture.height > max_pixels:
                raise _too_many_pixels(source, max_pixels)
            if plan is None:
                plan = picture_plan(picture, source, stream, work)
                room.enter_context(decoding(plan.cost, source.name))
                limited.left = None
            with _without_warnings():
                picture.load()
                result = convert(picture, plan.step)
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


def _rgb(picture: Image.Image, step: int) -> Image.Image:
    """RGB, each side `step` times smaller."""
    if step == 1:
        return _to_rgb(picture)
    if _is_measured(picture):
        return _to_rgb(_one_channel(picture, step))
    width, height = picture.size
    small = Image.new("RGB", (-(-width // step), -(-height // step)))
    rows = step * max(1, _STRIP_PIXELS // (width * step))
    for top in range(0, height, rows):
        strip = picture.crop((0, top, width, min(top + rows, height)))
        small.paste(_to_rgb(strip).reduce(step), (0, top // step))
    return small


def _one_channel(picture: Image.Image, step: int) -> Image.Image:
    if not _is_measured(picture):
        return picture if picture.mode == "L" and step == 1 else _rgb(picture, step).convert("L")
    if step == 1:
        return picture
    size = (max(1, picture.width // step), max(1, picture.height // step))
    return picture.resize(size, Image.Resampling.NEAREST)


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

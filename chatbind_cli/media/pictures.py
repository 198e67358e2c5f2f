"""Still pictures from bytes, and the resizing that pictures, depth and thermal maps share.

Knows the limits within which a stranger's picture is opened. What the pixels mean (colour,
distance, heat) is decided by `image`, `depth` and `thermal`.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch.nn import functional

from chatbind_cli.errors import MediaError
from chatbind_cli.media.budget import Timed, decoding
from chatbind_cli.media.modality import IMAGE_SIZE
from chatbind_cli.media.picture_cost import MAP_WORK, picture_plan, webp_plan
from chatbind_cli.media.source import MediaSource

# Named, because Pillow also has formats that start other programs (EPS) or read other files.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "PPM", "JPEG2000")

_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    AttributeError,
    MemoryError,
    struct.error,
    zlib.error,
)
"""What Pillow's readers raise on broken files; they check little before they compute."""

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

P = ParamSpec("P")
T = TypeVar("T")

_WIDEST = 8
"""Pictures more than 8 times as long as wide lose their far ends, which the crop drops anyway."""


def open_rgb(source: MediaSource, max_pixels: int) -> AbstractContextManager[Image.Image]:
    """The first frame of a picture in three channels of 8 bits, the way up its EXIF data say.

    A picture that would not fit the budget in full size is decoded at half, a quarter or an eighth
    of it, where the format can, and else averaged to that in strips.

    Raises:
        MediaError: it is not a picture, broken, larger than `max_pixels`, or its decoding would
            take more than the budget allows.
    """
    return _decoding(
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
    return _decoding(
        source,
        max_pixels,
        lambda picture, step: _array(_upright(picture, _one_channel(picture, step))),
        work=MAP_WORK,
    )


@contextmanager
def _decoding(
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
        limited = Timed(stream, left=_HEADER_BYTES)
        plan = webp_plan(source)
        if plan is not None:  # its reader takes the memory for the pixels when the file is opened
            limited.left = None
            room.enter_context(decoding(plan.cost, source.name))
        picture = _opened(limited, source, max_pixels)
        if plan is None:
            plan = _checked(source, picture_plan, picture, source, stream, work)
            room.enter_context(decoding(plan.cost, source.name))
            limited.left = None
        _checked(source, picture.load)
        result = _checked(source, convert, picture, plan.step)
        del picture  # before its room is given back
        try:
            yield result
        finally:
            del result


def _opened(stream: Timed, source: MediaSource, max_pixels: int) -> ImageFile.ImageFile:
    try:
        with _without_warnings():
            picture = Image.open(stream, formats=_FORMATS)  # type: ignore[arg-type]
    except UnidentifiedImageError as error:
        raise MediaError("is not a picture that can be read", where=source.name) from error
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(source, max_pixels) from error
    except _BROKEN as error:
        raise _broken(source, error) from error
    if picture.width * picture.height > max_pixels:
        raise _too_many_pixels(source, max_pixels)
    return picture


def _checked(source: MediaSource, work: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
    """What `work` gives, or the error that the picture is broken."""
    try:
        with _without_warnings():
            return work(*args, **named)
    except _BROKEN as error:
        raise _broken(source, error) from error


def is_measurement(source: MediaSource) -> bool:
    """Whether a picture has one channel of more than 8 bits; False for what cannot be opened."""
    with source.open() as stream:
        try:
            with _without_warnings():
                timed = Timed(stream, left=_HEADER_BYTES)
                mode = Image.open(timed, formats=_FORMATS).mode  # type: ignore[arg-type]
        except (*_BROKEN, Image.DecompressionBombError):
            return False  # the loader of pictures says what is wrong
    return mode in ("I", "F") or mode.startswith("I;16")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Pillow's warnings stay unsaid: odd metadata in a good picture, and sizes that we check."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _rgb(picture: Image.Image, step: int) -> Image.Image:
    """RGB, each side `step` times smaller. Transparency is dropped, as ImageBind does."""
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


def _array(picture: Image.Image) -> npt.NDArray[np.generic]:
    values = np.asarray(picture)
    return values.astype(np.uint16) if picture.mode.startswith("I;16") else values


def _upright(original: Image.Image, picture: Image.Image) -> Image.Image:
    """The picture, turned as the EXIF data of the original say."""
    turn = _TURNS.get(original.getexif().get(_ORIENTATION, 1))
    return picture if turn is None else picture.transpose(turn)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I;16"):
        # Pillow would cut the values at 255
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode == "I":
        values = np.clip(np.asarray(picture), 0, 65535)
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        values = np.nan_to_num(np.asarray(picture), nan=0.0, posinf=255.0, neginf=0.0)
        scale = 255.0 if values.max(initial=0.0) <= 1.0 else 1.0
        values = np.clip(values * scale, 0.0, 255.0)
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def narrow(picture: Image.Image) -> Image.Image:
    """The middle of a very long picture: resized whole, a strip would fill the memory."""
    width, height = picture.size
    if max(width, height) <= _WIDEST * min(width, height):
        return picture
    keep = _WIDEST * min(width, height)
    left = (width - keep) // 2 if width > height else 0
    top = (height - keep) // 2 if height > width else 0
    return picture.crop((left, top, left + min(width, keep), top + min(height, keep)))


def fit_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) with the short side 224 and the long one in proportion, rounded down."""
    if width <= height:
        return IMAGE_SIZE, int(IMAGE_SIZE * height / width)
    return int(IMAGE_SIZE * width / height), IMAGE_SIZE


def resize_map(values: torch.Tensor) -> torch.Tensor:
    """Brings a map of numbers to the encoder's size: short side 224, then the centre.

    Bilinear with antialiasing: unlike bicubic it never leaves the range of the values, which mean
    metres or heat here.

    Args:
        values: [height, width], float32.

    Returns:
        [1, 224, 224].
    """
    height, width = values.shape
    if max(width, height) > _WIDEST * min(width, height):
        keep = _WIDEST * min(width, height)
        top, left = max(height - keep, 0) // 2, max(width - keep, 0) // 2
        values = values[top : top + keep, left : left + keep]
        height, width = values.shape
    new_width, new_height = fit_size(width, height)
    resized = functional.interpolate(
        values[None, None],
        size=(new_height, new_width),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )
    top, left = round((new_height - IMAGE_SIZE) / 2), round((new_width - IMAGE_SIZE) / 2)
    return resized[0, :, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE].contiguous()


def _broken(source: MediaSource, error: Exception) -> MediaError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return MediaError(f"is a broken picture ({reason})", where=source.name)


def _too_many_pixels(source: MediaSource, max_pixels: int) -> MediaError:
    return MediaError(
        f"has more than {max_pixels:,} pixels", where=source.name, hint="raise --max-pixels"
    )

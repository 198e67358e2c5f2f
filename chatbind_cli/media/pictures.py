"""Still pictures from bytes, and the resizing that pictures, depth and thermal maps share.

Knows the limits within which a stranger's picture is opened. What the pixels mean (colour,
distance, heat) is decided by `image`, `depth` and `thermal`.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.nn import functional

from chatbind_cli.errors import MediaError
from chatbind_cli.media.modality import IMAGE_SIZE
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

_WIDEST = 8
"""Pictures more than 8 times as long as wide lose their far ends, which the crop drops anyway."""


@contextmanager
def open_picture(source: MediaSource, max_pixels: int) -> Iterator[Image.Image]:
    """The first frame of a picture, not yet decoded, the way up its EXIF data say.

    Raises:
        MediaError: it is not a picture, broken (here or when decoded inside the block), or larger
            than `max_pixels`.
    """
    with source.open() as stream:
        try:
            with _without_warnings():
                picture = Image.open(stream, formats=_FORMATS)
        except UnidentifiedImageError as error:
            raise MediaError("is not a picture that can be read", where=source.name) from error
        except Image.DecompressionBombError as error:
            raise _too_many_pixels(source, max_pixels) from error
        except _BROKEN as error:
            raise _broken(source, error) from error
        if picture.width * picture.height > max_pixels:
            raise _too_many_pixels(source, max_pixels)
        try:
            with _without_warnings():
                picture.load()
                upright = ImageOps.exif_transpose(picture)
        except _BROKEN as error:
            raise _broken(source, error) from error
        yield upright


def is_measurement(source: MediaSource) -> bool:
    """Whether a picture has one channel of more than 8 bits; False for what cannot be opened."""
    with source.open() as stream:
        try:
            with _without_warnings():
                mode = Image.open(stream, formats=_FORMATS).mode
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


def picture_array(picture: Image.Image) -> npt.NDArray[np.generic]:
    """The pixels of a one-channel picture in their own type, or of any other in luminance, 8 bit.

    Returns:
        [height, width] of uint8, uint16, int32 or float32.
    """
    if picture.mode in ("I;16", "I;16L", "I;16B", "I;16N"):
        return np.asarray(picture).astype(np.uint16)
    if picture.mode in ("L", "I", "F"):
        return np.asarray(picture)
    return np.asarray(to_rgb(picture).convert("L"))


def to_rgb(picture: Image.Image) -> Image.Image:
    """Three channels of 8 bits. Transparency is dropped, not blended, as ImageBind does."""
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

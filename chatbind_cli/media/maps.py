"""Maps of one number a pixel (depth, heat) and other arrays, from NPY files and pictures.

The header of a stranger's NPY file is checked before it is believed, and nothing in it is executed.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from chatbind_cli.errors import MediaError
from chatbind_cli.media.guard import decoding, reading
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.pictures import MAP_WORK, open_one_channel
from chatbind_cli.media.source import MediaSource

_NPY_MAGIC = b"\x93NUMPY"

_HEADER_BYTES = 64 * 1024
_MOST_AXES = 8
_LONGEST_AXIS = 2**48


@contextmanager
def open_map(source: MediaSource, options: MediaOptions) -> Iterator[npt.NDArray[np.generic]]:
    """The numbers of a map in their own type; a colour picture's luminance, 8 bit.

    Inside the block there is room for `MAP_WORK` bytes a pixel.

    Yields:
        [height, width].

    Raises:
        MediaError: it is no map, broken, too large, or its decoding would take more than the
            budget allows.
    """
    if not is_npy(source):
        with open_one_channel(source, options.max_pixels) as values:
            yield values
        return
    header = read_npy_header(source)
    if len(header.sides) != 2:
        raise MediaError(
            f"is an array of shape {list(header.shape)}, not [height, width]", where=source.name
        )
    pixels = math.prod(header.sides)
    if pixels > options.max_pixels:
        raise MediaError(f"has more than {options.max_pixels:,} pixels", where=source.name)
    with decoding(pixels * (header.dtype.itemsize + MAP_WORK), source.name):
        yield read_npy(source, options.max_array_bytes)


class Depth(NamedTuple):
    """A depth map, float32 [height, width].

    Attributes:
        numbers: metres, NaN where nothing was measured; or what the unit says.
        unit: `m`, `disparity` (pixels of the sensor), or `relative` (inverse depth of unknown
            scale).
    """

    numbers: npt.NDArray[np.float32]
    unit: str


@contextmanager
def open_depth(
    source: MediaSource, options: MediaOptions, *, small: str | None = None
) -> Iterator[Depth]:
    """A depth map; `options.depth_unit` may name its unit.

    Else (`auto`) whole numbers of 16 or 32 bits are millimetres, floating-point numbers metres. An
    8-bit picture can be anything, so its unit must be named, unless it is taken for `small`.

    Raises:
        MediaError: its unit is not known, it holds no depth, or see `open_map`.
    """
    with open_map(source, options) as values:
        unit = options.depth_unit
        if unit == "auto":
            unit = small if small and values.dtype.itemsize == 1 else _unit(values, source)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows counts as not measured
            numbers = values.astype(np.float32)
        del values
        if unit in ("mm", "m"):
            if unit == "mm":
                numbers /= 1000
            measured = np.isfinite(numbers) & (numbers > 0)
            if not measured.any():
                raise MediaError("holds no measured depth", where=source.name)
            numbers[~measured] = np.nan
            unit = "m"
        yield Depth(numbers, unit)


def _unit(values: npt.NDArray[np.generic], source: MediaSource) -> str:
    if values.dtype.kind == "f":
        return "m"
    if values.dtype.itemsize > 1:
        return "mm"
    raise MediaError(
        "is an 8-bit picture, which says nothing of its unit",
        where=source.name,
        hint="say it with --depth-unit (mm, m; relative: bright is near)",
    )


@contextmanager
def open_heat(source: MediaSource, options: MediaOptions) -> Iterator[npt.NDArray[np.float32]]:
    """A thermal picture as [height, width] in [0, 1], warm is bright.

    Values are divided by the range of their type (255 for 8 bits, 65535 for 16), so 16-bit pictures
    should use that range; floating-point pictures and NPY arrays must lie in [0, 1] already. Colour
    pictures are read as luminance.

    Raises:
        MediaError: floating-point values leave [0, 1], or see `open_map`.
    """
    with open_map(source, options) as values:
        # Pillow's 32-bit integers come from files of 16 bits
        if values.dtype == np.int32 and not is_npy(source):
            values = values.clip(0, 65535).astype(np.uint16)
        if values.dtype.kind == "f":
            if not (np.greater_equal(values, 0) & np.less_equal(values, 1)).all():  # nor NaN
                raise MediaError(
                    "holds floating-point values outside [0, 1]",
                    where=source.name,
                    hint="scale temperatures to [0, 1] first",
                )
        elif values.dtype.kind != "b":
            values = values.astype(np.float32) / float(np.iinfo(values.dtype.name).max)
        yield values.astype(np.float32, copy=False).clip(0, 1)


class NpyHeader(NamedTuple):
    """What an NPY file says of itself."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    @property
    def sides(self) -> list[int]:
        """The axes that are longer or shorter than 1."""
        return [side for side in self.shape if side != 1]


def is_npy(source: MediaSource) -> bool:
    """Whether a file begins as NPY does."""
    return source.head(len(_NPY_MAGIC)) == _NPY_MAGIC


def read_npy_header(source: MediaSource) -> NpyHeader:
    """The header of an NPY file of numbers.

    Raises:
        MediaError: it is not NPY, broken, holds something else than real numbers, or does not hold
            as many as it says.
    """
    head = io.BytesIO(source.head(_HEADER_BYTES))
    with _reading_npy(source):
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[np.lib.format.read_magic(head)]
        shape, _, dtype = read(head)
    if dtype.hasobject or dtype.kind not in "iufb":
        raise MediaError(f"holds {dtype.name[:40]}, not numbers", where=source.name)
    if len(shape) > _MOST_AXES or any(not 0 <= side <= _LONGEST_AXIS for side in shape):
        raise MediaError("is not a readable NPY file (an impossible shape)", where=source.name)
    held = source.size - head.tell()
    if math.prod(shape) * dtype.itemsize > held:
        raise MediaError(
            f"is cut short: it says {' x '.join(map(str, shape))} numbers of {dtype.itemsize} "
            f"bytes, and holds {held} bytes",
            where=source.name,
        )
    return NpyHeader(shape, dtype)


def read_npy(source: MediaSource, max_bytes: int) -> npt.NDArray[np.generic]:
    """The array of an NPY file, sides of length 1 removed.

    Args:
        source: the file.
        max_bytes: most bytes of numbers that are read.

    Raises:
        MediaError: see `read_npy_header`; or it is larger than `max_bytes`, or empty.
    """
    header = read_npy_header(source)
    count = math.prod(header.shape)
    if count * header.dtype.itemsize > max_bytes:
        raise MediaError(f"is larger than {max_bytes / 2**20:.4g} MiB", where=source.name)
    if not count:
        raise MediaError("holds no numbers", where=source.name)
    with source.open() as stream, _reading_npy(source):
        array = np.lib.format.read_array(stream, allow_pickle=False).squeeze()
        return array.astype(array.dtype.newbyteorder("="), copy=False)


@contextmanager
def _reading_npy(source: MediaSource) -> Iterator[None]:
    with reading(source.name, "is not a readable NPY file"), warnings.catch_warnings():
        # numpy speaks of files from Python 2, which it reads all the same
        warnings.simplefilter("ignore", UserWarning)
        yield

"""NPY files read within limits: the header of a stranger's file is checked before it is believed.

Knows nothing of what the numbers mean.
"""

from __future__ import annotations

import io
import math
import tokenize
import warnings
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from chatbind_cli.errors import MediaError
from chatbind_cli.media.source import MediaSource

NPY_MAGIC = b"\x93NUMPY"

_HEADER_BYTES = 64 * 1024
_MOST_AXES = 8
_LONGEST_AXIS = 2**48

_BROKEN = (
    ValueError,
    TypeError,
    SyntaxError,
    EOFError,
    OSError,
    OverflowError,
    RecursionError,
    MemoryError,
    tokenize.TokenError,
)
"""What numpy raises on broken headers, which are little programs to it."""


class NpyHeader(NamedTuple):
    """What an NPY file says of itself."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[np.generic]
    offset: int
    """Where the numbers begin, in bytes."""


def read_npy_header(source: MediaSource) -> NpyHeader:
    """The header of an NPY file of numbers.

    Raises:
        MediaError: it is not NPY, broken, holds something else than real numbers, or does not hold
            as many as it says.
    """
    stream = io.BytesIO(source.head(_HEADER_BYTES))
    try:
        shape, fortran_order, dtype = _parse_header(stream)
    except _BROKEN as error:
        raise MediaError("is not a readable NPY file", where=source.name) from error
    offset = stream.tell()
    if dtype.hasobject or dtype.kind not in "iufb":
        raise MediaError(f"holds {dtype.name[:40]}, not numbers", where=source.name)
    if len(shape) > _MOST_AXES or any(not 0 <= side <= _LONGEST_AXIS for side in shape):
        raise MediaError("is not a readable NPY file (an impossible shape)", where=source.name)
    held = source.size - offset
    if math.prod(shape) * dtype.itemsize > held:
        raise MediaError(
            f"is cut short: it says {' x '.join(map(str, shape))} numbers of {dtype.itemsize} "
            f"bytes, and holds {held} bytes",
            where=source.name,
        )
    return NpyHeader(shape, fortran_order, dtype, offset)


def _parse_header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    version = np.lib.format.read_magic(stream)
    with warnings.catch_warnings():
        # numpy speaks of files from Python 2, which it reads all the same
        warnings.simplefilter("ignore", UserWarning)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(stream)
        if version == (2, 0):
            return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"version {version[0]}.{version[1]}")


def read_npy(source: MediaSource, max_bytes: int, *, step: int = 1) -> npt.NDArray[np.generic]:
    """The array of an NPY file, sides of length 1 removed. Nothing in it is ever executed.

    Args:
        source: the file.
        max_bytes: most bytes of numbers that are read.
        step: of two-dimensional arrays, only every so many-th row and column comes back.

    Raises:
        MediaError: see `read_npy_header`; or it is larger than `max_bytes`, or empty.
    """
    header = read_npy_header(source)
    count = math.prod(header.shape)
    if count * header.dtype.itemsize > max_bytes:
        raise MediaError(f"is larger than {max_bytes / 2**20:.4g} MiB", where=source.name)
    if not count:
        raise MediaError("holds no numbers", where=source.name)
    with source.open() as stream:
        stream.seek(header.offset)
        content = stream.read(count * header.dtype.itemsize)
    if len(content) < count * header.dtype.itemsize:
        raise MediaError("is cut short", where=source.name)  # since it was looked at
    flat = np.frombuffer(content, dtype=header.dtype, count=count)
    array = flat.reshape(header.shape, order="F" if header.fortran_order else "C").squeeze()
    if step > 1:
        array = array[::step, ::step]
    return array.astype(array.dtype.newbyteorder("="), copy=False)

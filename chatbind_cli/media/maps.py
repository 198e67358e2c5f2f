"""Maps of one number a pixel (depth, heat) from NPY files and pictures, within the budget.

What the numbers mean is decided by `depth` and `thermal`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from chatbind_cli.errors import MediaError
from chatbind_cli.media.arrays import NPY_MAGIC, read_npy, read_npy_header
from chatbind_cli.media.budget import ONE_BYTES, decoding
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.picture_cost import MAP_WORK
from chatbind_cli.media.pictures import open_one_channel
from chatbind_cli.media.source import MediaSource


@contextmanager
def open_map(source: MediaSource, options: MediaOptions) -> Iterator[npt.NDArray[np.generic]]:
    """The numbers of a map in their own type; a colour picture's luminance, 8 bit.

    Inside the block there is room for `MAP_WORK` bytes a pixel. Of a map too large for that, every
    second, fourth or eighth pixel is taken in both directions: a mean would mix readings with
    holes.

    Yields:
        [height, width].

    Raises:
        MediaError: it is no map, broken, too large, or its decoding would take more than the
            budget allows.
    """
    if source.head(len(NPY_MAGIC)) != NPY_MAGIC:
        with open_one_channel(source, options.max_pixels) as values:
            yield values
        return
    header = read_npy_header(source)
    sides = [side for side in header.shape if side != 1]
    if len(sides) != 2:
        raise MediaError(
            f"is an array of shape {list(header.shape)}, not [height, width]", where=source.name
        )
    pixels = math.prod(sides)
    if pixels > options.max_pixels:
        raise MediaError(f"has more than {options.max_pixels:,} pixels", where=source.name)
    for step in (1, 2, 4, 8):
        cost = pixels * header.dtype.itemsize + pixels // step**2 * MAP_WORK
        if cost <= ONE_BYTES:
            break
    with decoding(cost, source.name):
        yield read_npy(source, options.max_array_bytes, step=step)

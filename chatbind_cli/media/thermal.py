"""Thermal pictures -> the encoder's one-channel tensor.

ImageBind published no loader for thermal pictures; this one follows the paper (one channel) and the
measurement that its thermal tower wants plain [0, 1] values, without mean and deviation.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from chatbind_cli.errors import MediaError
from chatbind_cli.media.arrays import NPY_MAGIC
from chatbind_cli.media.maps import open_map
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.pictures import resize_map
from chatbind_cli.media.source import MediaSource


def load_thermal(source: MediaSource, options: MediaOptions) -> torch.Tensor:
    """Reads a thermal picture as one channel in [0, 1], warm is bright.

    Values are divided by the range of their type (255 for 8 bits, 65535 for 16), so 16-bit pictures
    should use that range; floating-point pictures and NPY arrays must lie in [0, 1] already. Colour
    pictures are read as luminance. Short side to 224 (bilinear), centre crop; no mean, no
    deviation.

    Returns:
        [1, 224, 224] float32 in [0, 1].

    Raises:
        MediaError: it is no picture, broken, too large, or floating-point values leave [0, 1].

    Source: ImageBind (Girdhar et al., 2023), section 3; ImageBind pull request 73 (LLVIP is
    classified better without normalisation).
    """
    with open_map(source, options) as values:
        # Pillow's 32-bit integers come from files of 16 bits
        if values.dtype == np.int32 and source.head(len(NPY_MAGIC)) != NPY_MAGIC:
            values = values.clip(0, 65535).astype(np.uint16)
        heat = _heat(values, source)
        return resize_map(torch.from_numpy(heat)).clamp(0, 1)


def _heat(values: npt.NDArray[np.generic], source: MediaSource) -> npt.NDArray[np.float32]:
    """[height, width] in [0, 1]."""
    if values.dtype.kind == "f":
        if not (np.greater_equal(values, 0) & np.less_equal(values, 1)).all():  # nor NaN
            raise MediaError(
                "holds floating-point values outside [0, 1]",
                where=source.name,
                hint="scale temperatures to [0, 1] first",
            )
    elif values.dtype.kind != "b":
        heat = values.astype(np.float32) / float(np.iinfo(values.dtype.name).max)
        return heat.clip(0, 1)
    return values.astype(np.float32)

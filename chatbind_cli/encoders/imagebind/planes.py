"""Depth maps and thermal pictures -> the one-channel tensors of their towers.

ImageBind published no loader for either. These follow what its paper says and the constants that
its authors' data and later measurements give; see `load_depth` and `load_thermal`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from chatbind_cli.encoders.imagebind.config import IMAGE_SIZE
from chatbind_cli.encoders.pixels import centre, fit_size, narrow_box
from chatbind_cli.errors import MediaError
from chatbind_cli.media.maps import open_depth, open_heat
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import MediaSource

Numbers = npt.NDArray[np.float32]

_NEAREST_M, _FARTHEST_M = 0.01, 8.0
"""Range of the sensors of SUN RGB-D; its own toolbox cuts at 8 m."""

_MOST_PX = 600.0
"""Largest disparity that Omnivore lets through: 75, times 8 for the shift of SUN RGB-D's PNGs."""

_MEAN_PX, _STD_PX = 24.82, 14.40
"""Statistics of SUN RGB-D's disparities."""


def load_depth(source: MediaSource, options: MediaOptions) -> torch.Tensor:
    """Reads a depth map and turns it into standardised disparity.

    disparity = baseline * focal length / depth, in pixels of the sensor, then
    (disparity - 24.82) / 14.40, short side to 224 (bilinear), centre crop.

    Units: see `media.maps.open_depth`; of `relative` depth, as monocular estimators give it, its
    own mean and deviation are used. Depths are cut to 0.01 ... 8 m; where nothing was measured (0,
    NaN, infinite) the depth is 8 m. Sensor constants:
    `options.depth_baseline_m` (0.075: Kinect; 0.095: RealSense, Xtion) and `options.depth_focal_px`
    (518.86: the Kinect of NYU-D).

    Returns:
        [1, 224, 224] float32.

    Raises:
        MediaError: it is no depth map, broken, too large, or of an unknown unit.

    Source: ImageBind (Girdhar et al., 2023), section 4 and appendix: disparity for scale
    normalisation, after Omnivore (2022). Mean and deviation are our choice, since none were
    published with ImageBind: those of public SUN RGB-D loaders with this disparity formula.
    Omnivore's own 0.0418 * 75, times 8 for the 3-bit shift of those files, is the same mean
    within 1 %.
    """
    with open_depth(source, options) as (numbers, unit):
        if unit == "relative":
            return _resize(_own_scale(numbers, source))
        if unit == "disparity":
            disparity = np.nan_to_num(numbers)
        else:
            metres = np.nan_to_num(numbers, nan=_FARTHEST_M).clip(_NEAREST_M, _FARTHEST_M)
            disparity = options.depth_baseline_m * options.depth_focal_px / metres
        return (_resize(disparity.clip(0.0, _MOST_PX)) - _MEAN_PX) / _STD_PX


def load_thermal(source: MediaSource, options: MediaOptions) -> torch.Tensor:
    """Reads a thermal picture as one channel in [0, 1], warm is bright: see `media.maps.open_heat`.

    Short side to 224 (bilinear), centre crop; no mean, no deviation.

    Returns:
        [1, 224, 224] float32 in [0, 1].

    Raises:
        MediaError: it is no picture, broken, too large, or floating-point values leave [0, 1].

    Source: ImageBind (Girdhar et al., 2023), section 3 (one channel); ImageBind pull request 73
    (LLVIP is classified better without normalisation).
    """
    with open_heat(source, options) as heat:
        return _resize(heat).clamp(0, 1)


def _own_scale(inverse: Numbers, source: MediaSource) -> Numbers:
    valid = np.isfinite(inverse)
    if not valid.any():
        raise MediaError("holds no measured depth", where=source.name)
    mean, spread = float(inverse[valid].mean()), float(inverse[valid].std())
    filled = np.where(valid, inverse, inverse[valid].min())
    return ((filled - mean) / (spread if spread > 0 else 1.0)).astype(np.float32)


def _resize(plane: Numbers) -> torch.Tensor:
    """Brings a map of numbers to the encoder's size: short side 224, then the centre.

    Bilinear with antialiasing: unlike bicubic it never leaves the range of the values, which mean
    metres or heat here.

    Args:
        plane: [height, width].

    Returns:
        [1, 224, 224].
    """
    left, top, right, bottom = narrow_box(plane.shape[1], plane.shape[0])
    values = torch.from_numpy(plane)[top:bottom, left:right]
    width, height = fit_size(values.shape[1], values.shape[0], IMAGE_SIZE)
    resized = functional.interpolate(
        values[None, None],
        size=(height, width),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )
    return centre(resized[0], IMAGE_SIZE).contiguous()

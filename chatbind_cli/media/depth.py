"""Depth maps -> the encoder's standardised disparity.

ImageBind published no loader for depth. This one follows what its paper says (absolute depth is
turned into disparity, for scale) and the constants that its authors' data and later measurements
give; see `load_depth`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from chatbind_cli.errors import MediaError
from chatbind_cli.media.maps import open_map
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.pictures import resize_map
from chatbind_cli.media.source import MediaSource

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

    Units (`options.depth_unit`): `mm`, `m`, `disparity` (pixels), `relative` (inverse depth of
    unknown scale, near is large, as monocular estimators give it: its own mean and deviation are
    used), or `auto`: whole numbers of 16 or 32 bits are millimetres, floating-point numbers metres.
    An 8-bit picture can be anything, so its unit must be named. Depths are cut to 0.01 ... 8 m;
    where nothing was measured (0, NaN, infinite) the depth is 8 m. Sensor constants:
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
    with open_map(source, options) as values:
        tensor = _standardised(values, source, options)
        del values
    return tensor


def _standardised(
    values: npt.NDArray[np.generic], source: MediaSource, options: MediaOptions
) -> torch.Tensor:
    """[height, width] as it is stored -> [1, 224, 224]."""
    unit = options.depth_unit if options.depth_unit != "auto" else _unit(values, source)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows counts as not measured
        numbers = values.astype(np.float32)
    if unit == "relative":
        return resize_map(torch.from_numpy(_own_scale(numbers, source)))
    if unit == "disparity":
        disparity = np.nan_to_num(numbers, nan=0.0, posinf=_MOST_PX, neginf=0.0)
    else:
        metres = numbers / 1000 if unit == "mm" else numbers
        measured = np.isfinite(metres) & (metres > 0)
        if not measured.any():
            raise MediaError("holds no measured depth", where=source.name)
        metres = np.where(measured, metres, _FARTHEST_M).clip(_NEAREST_M, _FARTHEST_M)
        disparity = np.asarray(
            options.depth_baseline_m * options.depth_focal_px / metres, dtype=np.float32
        )
    limited = np.clip(disparity, 0.0, _MOST_PX).astype(np.float32)
    return (resize_map(torch.from_numpy(limited)) - _MEAN_PX) / _STD_PX


def _unit(values: npt.NDArray[np.generic], source: MediaSource) -> str:
    if values.dtype.kind == "f":
        return "m"
    if values.dtype.itemsize > 1:
        return "mm"
    raise MediaError(
        "is an 8-bit picture, which says nothing of its unit",
        where=source.name,
        hint="say it with --depth-unit (relative: bright is near)",
    )


def _own_scale(inverse: npt.NDArray[np.float32], source: MediaSource) -> npt.NDArray[np.float32]:
    valid = np.isfinite(inverse)
    if not valid.any():
        raise MediaError("holds no measured depth", where=source.name)
    mean, spread = float(inverse[valid].mean()), float(inverse[valid].std())
    filled = np.where(valid, inverse, inverse[valid].min())
    return ((filled - mean) / (spread if spread > 0 else 1.0)).astype(np.float32)

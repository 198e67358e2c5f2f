"""Sizes and colours of pictures, as encoders that grew from CLIP see them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Per-channel statistics of CLIP's training images, RGB in [0, 1] (Radford et al., 2021)."""


def narrow_box(width: int, height: int, widest: int = 8) -> tuple[int, int, int, int]:
    """The middle of a very long picture: resized whole, a strip would fill the memory.

    Args:
        width: of the picture.
        height: of the picture.
        widest: how many times as long as wide it may be to be kept whole. The crop drops the ends
            anyway, but without them sizes and places are rounded otherwise.

    Returns:
        left, top, right, bottom.
    """
    keep = widest * min(width, height)
    left, top = max(width - keep, 0) // 2, max(height - keep, 0) // 2
    return left, top, left + min(width, keep), top + min(height, keep)


def fit_size(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) with the short side `size` and the long one in proportion, rounded down."""
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


def centre(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """The middle [..., size, size] of [..., height, width]."""
    top, left = (round((side - size) / 2) for side in pixels.shape[-2:])
    return pixels[..., top : top + size, left : left + size]


def as_numbers(rgb: npt.NDArray[np.uint8]) -> torch.Tensor:
    """RGB of 8 bits, [height, width, 3], as float32 [3, height, width] in [0, 1]."""
    return torch.from_numpy(rgb).permute(2, 0, 1).to(torch.float32).div_(255)


def scale_frame(rgb: npt.NDArray[np.uint8], size: int) -> torch.Tensor:
    """A frame [height, width, 3] scaled to the short side `size`, standardised.

    Bilinear, in floating point.

    Source: pytorchvideo's `ShortSideScale`.
    """
    height, width = rgb.shape[:2]
    if width < height:
        scaled = (math.floor(height / width * size), size)
    else:
        scaled = (size, math.floor(width / height * size))
    pixels = functional.interpolate(
        as_numbers(rgb)[None], size=scaled, mode="bilinear", align_corners=False
    )
    return standardised(pixels[0])


def standardised(pixels: torch.Tensor) -> torch.Tensor:
    """RGB, or one channel for all three, in [0, 1], with CLIP's mean and deviation.

    Args:
        pixels: [3 or 1, height, width].

    Returns:
        [3, height, width].
    """
    mean = torch.tensor(CLIP_MEAN)[:, None, None]
    std = torch.tensor(CLIP_STD)[:, None, None]
    return (pixels - mean) / std

"""Pictures and films -> the tensors of the vision tower: ImageBind's evaluation transforms."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from chatbind_cli.encoders.imagebind.clips import clips_of
from chatbind_cli.encoders.imagebind.config import IMAGE_SIZE
from chatbind_cli.encoders.pixels import (
    as_numbers,
    centre,
    fit_size,
    narrow_box,
    scale_frame,
    standardised,
)
from chatbind_cli.media.guard import IMPORTING
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.pictures import open_rgb
from chatbind_cli.media.source import MediaSource


def load_image(source: MediaSource, options: MediaOptions) -> torch.Tensor:
    """Reads a picture: short side to 224 (bicubic), centre crop, CLIP's mean and deviation.

    With one difference to ImageBind: EXIF orientation is honoured, so a phone's upright photo is
    seen upright.

    Returns:
        [3, 224, 224] float32, RGB.

    Raises:
        MediaError: it is not a picture, broken, or has more than `options.max_pixels` pixels.

    Source: ImageBind (Girdhar et al., 2023), `load_and_transform_vision_data`.
    """
    with open_rgb(source, options.max_pixels) as whole:
        left, top, right, bottom = box = narrow_box(*whole.size)
        size = fit_size(right - left, bottom - top, IMAGE_SIZE)
        resized = whole.resize(size, Image.Resampling.BICUBIC, box=box)
        del whole
    return standardised(centre(as_numbers(np.array(resized)), IMAGE_SIZE)).contiguous()


def load_video(source: MediaSource, options: MediaOptions) -> torch.Tensor:
    """Reads a few clips of a video: of each its first and last frame, each frame in three crops.

    The short side is scaled to 224 (bilinear, in floating point), colours get CLIP's mean and
    deviation, and the crops are left, centre and right (top, centre and bottom of an upright
    video). A video shorter than a clip gives equal clips. For the rest see `media.video.read_ends`.

    Returns:
        [clips * 3 crops, 3 colours, 2 frames, 224, 224] float32, clip by clip.

    Raises:
        MediaError: see `media.video.read_ends`.

    Source: ImageBind (Girdhar et al., 2023), `load_and_transform_video_data`.
    """
    with IMPORTING:
        from chatbind_cli.media.video import read_ends  # noqa: PLC0415  a picture needs no FFmpeg

    cut = partial(
        clips_of, options=options, count=options.video_clips, where=source.name, frames=True
    )
    ends = read_ends(source, cut, _three_crops, max_pixels=options.max_pixels)
    return torch.cat([torch.stack(pair, dim=2) for pair in ends])


def _three_crops(rgb: npt.NDArray[np.uint8]) -> torch.Tensor:
    """One frame [height, width, 3] as the encoder wants it, [3 crops, 3 colours, 224, 224]."""
    coloured = scale_frame(rgb, IMAGE_SIZE)
    size = coloured.shape[1:]
    spare = max(size) - IMAGE_SIZE
    crops = []
    for offset in (0, math.ceil(spare / 2), spare):
        top, left = (offset, 0) if size[0] > size[1] else (0, offset)
        crops.append(coloured[:, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE])
    return torch.stack(crops)

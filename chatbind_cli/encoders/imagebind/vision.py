"""Pictures and films -> the tensors of the vision tower: ImageBind's evaluation transforms."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional

from chatbind_cli.encoders.imagebind.clips import clips_of
from chatbind_cli.encoders.imagebind.config import IMAGE_SIZE
from chatbind_cli.media.guard import IMPORTING
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.pictures import open_rgb
from chatbind_cli.media.source import MediaSource

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Per-channel statistics of CLIP's training images, RGB in [0, 1] (Radford et al., 2021)."""

WIDEST = 8
"""Pictures more than 8 times as long as wide lose their far ends, which the crop drops anyway."""


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
        rgb = _narrow(whole)
        resized = rgb.resize(fit_size(*rgb.size), Image.Resampling.BICUBIC)
        del whole, rgb
    left = round((resized.width - IMAGE_SIZE) / 2)
    top = round((resized.height - IMAGE_SIZE) / 2)
    crop = resized.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).to(torch.float32) / 255
    return _standardised(pixels).contiguous()


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


def fit_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) with the short side 224 and the long one in proportion, rounded down."""
    if width <= height:
        return IMAGE_SIZE, int(IMAGE_SIZE * height / width)
    return int(IMAGE_SIZE * width / height), IMAGE_SIZE


def _narrow(picture: Image.Image) -> Image.Image:
    """The middle of a very long picture: resized whole, a strip would fill the memory."""
    width, height = picture.size
    if max(width, height) <= WIDEST * min(width, height):
        return picture
    keep = WIDEST * min(width, height)
    left, top = max(width - keep, 0) // 2, max(height - keep, 0) // 2
    return picture.crop((left, top, left + min(width, keep), top + min(height, keep)))


def _three_crops(rgb: npt.NDArray[np.uint8]) -> torch.Tensor:
    """One frame [height, width, 3] as the encoder wants it, [3 crops, 3 colours, 224, 224]."""
    height, width = rgb.shape[:2]
    if width < height:
        size = (math.floor(height / width * IMAGE_SIZE), IMAGE_SIZE)
    else:
        size = (IMAGE_SIZE, math.floor(width / height * IMAGE_SIZE))
    pixels = torch.from_numpy(rgb).permute(2, 0, 1).to(torch.float32).div_(255)
    scaled = functional.interpolate(pixels[None], size=size, mode="bilinear", align_corners=False)
    coloured = _standardised(scaled[0])
    spare = max(size) - IMAGE_SIZE
    crops = []
    for offset in (0, math.ceil(spare / 2), spare):
        top, left = (offset, 0) if size[0] > size[1] else (0, offset)
        crops.append(coloured[:, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE])
    return torch.stack(crops)


def _standardised(pixels: torch.Tensor) -> torch.Tensor:
    """RGB [3, height, width] in [0, 1] with CLIP's mean and deviation."""
    mean = torch.tensor(CLIP_MEAN)[:, None, None]
    std = torch.tensor(CLIP_STD)[:, None, None]
    return (pixels - mean) / std

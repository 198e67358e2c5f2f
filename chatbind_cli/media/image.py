"""Photographs and drawings -> the encoder's picture tensor.

ImageBind's evaluation transform, with one difference: EXIF orientation is honoured, so a phone's
upright photo is seen upright.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from chatbind_cli.media.modality import CLIP_MEAN, CLIP_STD, IMAGE_SIZE
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.pictures import fit_size, narrow, open_rgb
from chatbind_cli.media.source import MediaSource


def load_image(source: MediaSource, options: MediaOptions) -> torch.Tensor:
    """Reads a picture: short side to 224 (bicubic), centre crop, CLIP's mean and deviation.

    JPEG, PNG, WebP, BMP, TIFF, GIF (first frame), AVIF, PPM, JPEG 2000; grey, palette, CMYK and
    16-bit pictures become RGB; transparency is dropped.

    Returns:
        [3, 224, 224] float32, RGB.

    Raises:
        MediaError: it is not a picture, broken, or has more than `options.max_pixels` pixels.

    Source: ImageBind (Girdhar et al., 2023), `load_and_transform_vision_data`.
    """
    with open_rgb(source, options.max_pixels) as whole:
        rgb = narrow(whole)
        resized = rgb.resize(fit_size(*rgb.size), Image.Resampling.BICUBIC)
        del whole, rgb
    left = round((resized.width - IMAGE_SIZE) / 2)
    top = round((resized.height - IMAGE_SIZE) / 2)
    crop = resized.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).to(torch.float32) / 255
    mean = torch.tensor(CLIP_MEAN)[:, None, None]
    std = torch.tensor(CLIP_STD)[:, None, None]
    return ((pixels - mean) / std).contiguous()

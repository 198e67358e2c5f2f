"""From files to the tensors of ImageBind's towers, by modality."""

from __future__ import annotations

from functools import partial

import torch

from chatbind_cli.encoders.encoder import load_media as load_for
from chatbind_cli.encoders.imagebind import vision
from chatbind_cli.media.guard import IMPORTING
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import MediaSource


def read(source: MediaSource, modality: str, options: MediaOptions) -> torch.Tensor:
    """Reads one medium; what other modalities than pictures need is imported when they come.

    Returns:
        float32: image [3, 224, 224]; video [clips * 3 crops, 3 colours, 2 frames, 224, 224]; audio
        [clips, 1, 128 mel bins, 204 steps]; depth and thermal [1, 224, 224]; imu [6, 2000].

    Raises:
        MediaError: it cannot be read.
    """
    load = vision.load_image
    with IMPORTING:
        match modality:
            case "video":
                load = vision.load_video
            case "audio":
                from chatbind_cli.encoders.imagebind.audio import load_audio as load  # noqa: PLC0415
            case "depth":
                from chatbind_cli.encoders.imagebind.planes import load_depth as load  # noqa: PLC0415
            case "thermal":
                from chatbind_cli.encoders.imagebind.planes import load_thermal as load  # noqa: PLC0415
            case "imu":
                from chatbind_cli.encoders.imagebind.imu import load_imu as load  # noqa: PLC0415
    return load(source, options)


load_media = partial(load_for, read)

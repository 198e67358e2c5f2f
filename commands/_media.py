"""The options that say how media become tensors, for every command that reads media."""

from __future__ import annotations

from functools import partial

import click

from chatbind_cli.media.options import (
    ACCEL_UNITS,
    CLIP_SAMPLERS,
    DEPTH_UNITS,
    GYRO_UNITS,
    MediaOptions,
)

from ._base import GroupedOption
from ._options import gather

_DEFAULTS = MediaOptions()
_option = partial(click.option, cls=GroupedOption, group="Preprocessing", advanced=True)

media_options = gather(
    "media",
    MediaOptions,
    _option(
        "--audio-clips",
        type=click.IntRange(min=1),
        default=_DEFAULTS.audio_clips,
        help="Clips of a sound; their embeddings are averaged.",
    ),
    _option(
        "--video-clips",
        type=click.IntRange(min=1),
        default=_DEFAULTS.video_clips,
        help="Clips of a video, three crops each; their embeddings are averaged.",
    ),
    _option(
        "--clip-seconds",
        type=click.FloatRange(min=0, min_open=True),
        default=_DEFAULTS.clip_seconds,
        help="Length of a clip. A recording that is shorter gives equal clips of all of it.",
    ),
    _option(
        "--clip-sampler",
        type=click.Choice(CLIP_SAMPLERS),
        default=_DEFAULTS.clip_sampler,
        help="imagebind: clips from start to end; chatbind: as published ChatBind weights want "
        "them, the last clip ending before the end; pytorchvideo: that library's sampler.",
    ),
    _option(
        "--depth-unit",
        type=click.Choice(DEPTH_UNITS),
        default=_DEFAULTS.depth_unit,
        help="Of depth maps; auto: 16-bit pictures are millimetres, floating-point arrays metres.",
    ),
    _option(
        "--depth-baseline-m",
        type=click.FloatRange(min=0, min_open=True),
        default=_DEFAULTS.depth_baseline_m,
        help="Baseline of the depth sensor in metres, for disparity = baseline * focal / depth.",
    ),
    _option(
        "--depth-focal-px",
        type=click.FloatRange(min=0, min_open=True),
        default=_DEFAULTS.depth_focal_px,
        help="Focal length of the depth sensor in pixels.",
    ),
    _option(
        "--imu-rate-hz",
        type=click.FloatRange(min=0, min_open=True),
        help="Samples a second of motion recordings that have no time column.",
    ),
    _option(
        "--imu-start-seconds",
        type=click.FloatRange(min=0),
        help="Where the 5 s window of a motion recording starts; default: its middle. After the "
        "end of a shorter recording its last reading is held.",
    ),
    _option(
        "--imu-accel-unit",
        type=click.Choice(ACCEL_UNITS),
        default=_DEFAULTS.imu_accel_unit,
        help="Of the accelerometer.",
    ),
    _option(
        "--imu-gyro-unit",
        type=click.Choice(GYRO_UNITS),
        default=_DEFAULTS.imu_gyro_unit,
        help="Of the gyroscope.",
    ),
    _option(
        "--max-pixels",
        type=click.IntRange(min=1),
        default=_DEFAULTS.max_pixels,
        help="Largest picture or frame that is decoded, width times height.",
    ),
)
"""The options of `MediaOptions`, handed to the function as one argument `media`."""

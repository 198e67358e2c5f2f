"""Options that say how media become tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click

from chatbind_cli.media.options import (
    ACCEL_UNITS,
    CLIP_SAMPLERS,
    DEPTH_UNITS,
    GYRO_UNITS,
    MediaOptions,
)

from ._base import in_group, is_given
from ._options import gather

_POSITIVE = click.FloatRange(min=0, min_open=True)


def _preprocessing(
    name: str, kind: click.ParamType[Any], help_text: str, *, advanced: bool = True
) -> Callable[[Any], Any]:
    return in_group("Preprocessing")(
        f"--{name}",
        type=kind,
        default=getattr(MediaOptions(), name.replace("-", "_")),
        help=help_text,
        advanced=advanced,
    )


media_options = gather(
    "media",
    MediaOptions,
    _preprocessing(
        "audio-clips",
        click.IntRange(min=1),
        "Clips of a sound; their embeddings are averaged.",
    ),
    _preprocessing(
        "video-clips",
        click.IntRange(min=1),
        "Clips of a video, three crops each; their embeddings are averaged.",
    ),
    _preprocessing(
        "clip-seconds",
        _POSITIVE,
        "Length of a clip. A recording that is shorter gives equal clips of all of it.",
    ),
    _preprocessing(
        "clip-sampler",
        click.Choice(CLIP_SAMPLERS),
        "imagebind: clips from start to end; chatbind: as published ChatBind weights want "
        "them, the last clip ending before the end; pytorchvideo: that library's sampler.",
    ),
    _preprocessing(
        "fps",
        _POSITIVE,
        "Frames a second of a video to look at, two a clip, in place of --video-clips: long videos "
        "get more clips, 64 at most.",
        advanced=False,
    ),
    _preprocessing(
        "start",
        click.FloatRange(min=0),
        "Second of a video or sound that its clips start from.",
        advanced=False,
    ),
    _preprocessing(
        "end",
        _POSITIVE,
        "Second of a video or sound that its clips end at; default, and where it is shorter: its "
        "end.",
        advanced=False,
    ),
    _preprocessing(
        "depth-unit",
        click.Choice(DEPTH_UNITS),
        "Of depth maps; auto: 16-bit pictures are millimetres, floating-point arrays metres.",
        advanced=False,
    ),
    _preprocessing(
        "depth-baseline-m",
        _POSITIVE,
        "Baseline of the depth sensor in metres, for disparity = baseline * focal / depth.",
    ),
    _preprocessing("depth-focal-px", _POSITIVE, "Focal length of the depth sensor in pixels."),
    _preprocessing(
        "imu-rate-hz",
        _POSITIVE,
        "Samples a second of motion recordings that have no time column.",
        advanced=False,
    ),
    _preprocessing(
        "imu-start-seconds",
        click.FloatRange(min=0),
        "Where the 5 s window of a motion recording starts; default: its middle. After the "
        "end of a shorter recording its last reading is held.",
    ),
    _preprocessing("imu-accel-unit", click.Choice(ACCEL_UNITS), "Of the accelerometer."),
    _preprocessing("imu-gyro-unit", click.Choice(GYRO_UNITS), "Of the gyroscope."),
    _preprocessing(
        "max-pixels",
        click.IntRange(min=1),
        "Largest picture or frame that is decoded, width times height.",
    ),
)
"""The options of `MediaOptions`, handed to the function as one argument `media`."""


def media_changes(media: MediaOptions) -> dict[str, Any]:
    """The fields of `MediaOptions` that the user has said; in the others the model has its way."""
    names = (field.name for field in fields(media))
    return {name: getattr(media, name) for name in names if is_given(name)}

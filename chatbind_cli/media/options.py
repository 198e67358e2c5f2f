"""Everything a caller may choose about how media files become tensors.

One frozen object travels through the loaders, and `fingerprint` names the choices that change a
modality's tensor, so that stored embeddings are never mixed with others. Where options come from
(command line, model config) is not known here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from chatbind_cli.errors import MediaError, UsageError
from chatbind_cli.media.modality import MODALITIES

PREPROCESSING_VERSION: Final = 1
"""Raise this when a loader's numbers change for any input."""

CLIP_SAMPLERS: Final = ("imagebind", "chatbind", "pytorchvideo")
DEPTH_UNITS: Final = ("auto", "mm", "m", "disparity", "relative")
ACCEL_UNITS: Final = ("m/s2", "g")
GYRO_UNITS: Final = ("rad/s", "deg/s")
_LIMITS: Final = ("max_pixels", "max_array_bytes")
MOST_CLIPS: Final = 64
"""Of a video of any length by `fps`: each is three pictures of two frames for the encoder."""

FIELDS: Final = {
    "image": (),
    "video": ("video_clips", "clip_seconds", "clip_sampler", "fps", "start", "end"),
    "audio": ("audio_clips", "clip_seconds", "clip_sampler", "start", "end"),
    "depth": ("depth_unit", "depth_baseline_m", "depth_focal_px"),
    "thermal": (),
    "imu": ("imu_rate_hz", "imu_start_seconds", "imu_accel_unit", "imu_gyro_unit"),
}
"""The fields that may decide a modality's tensor, in the order of its fingerprint; which of them
an encoder looks at says `Encoder.heeds`."""
_IF_SAID: Final = ("fps", "start", "end")
"""Those that are part of a fingerprint where they have a value."""


@dataclass(frozen=True, kw_only=True)
class MediaOptions:
    """How files become tensors. The defaults are ImageBind's.

    Raises:
        UsageError: a value is outside its range, or not one of the names that exist.
    """

    audio_clips: int = 3
    video_clips: int = 5
    clip_seconds: float = 2.0
    clip_sampler: str = "imagebind"
    """`imagebind`: first clip at the start, last at the end; `chatbind`: clip i of n starts at i/n
    of the slack, as published ChatBind weights saw it; `pytorchvideo`: that library's own
    sampler."""
    fps: float | None = None
    """Frames a second of a video that are looked at, two a clip and `MOST_CLIPS` clips at most, in
    place of `video_clips`; clips are shared out over the video all the same."""
    start: float | None = None
    end: float | None = None
    """Seconds of a video or sound between which clips lie, as if the rest were not there; None: at
    its ends, and an end after that of the recording means the same."""

    depth_unit: str = "auto"
    """`auto`: 16-bit pictures and whole numbers are millimetres, floating-point arrays metres."""
    depth_baseline_m: float = 0.075
    depth_focal_px: float = 518.857901
    """Baseline and focal length of the depth sensor: disparity = baseline * focal / depth."""

    imu_rate_hz: float | None = None
    """Samples per second of a motion recording that has no time column."""
    imu_start_seconds: float | None = None
    """Where the 5 s window starts; None: the middle of the recording."""
    imu_accel_unit: str = "m/s2"
    imu_gyro_unit: str = "rad/s"

    max_pixels: int = 178_956_970
    """Largest picture or video frame that is decoded, width * height: Pillow's own limit. What
    would not fit the budget of memory is refused, or decoded at a smaller size, before."""
    max_array_bytes: int = 256 * 1024 * 1024
    """Largest array or table (NPY, CSV, Parquet) that is read."""

    def __post_init__(self) -> None:
        for name, names in (
            ("clip_sampler", CLIP_SAMPLERS),
            ("depth_unit", DEPTH_UNITS),
            ("imu_accel_unit", ACCEL_UNITS),
            ("imu_gyro_unit", GYRO_UNITS),
        ):
            if getattr(self, name) not in names:
                raise UsageError(
                    f"{name} is {getattr(self, name)!r}", hint=f"choose one of {', '.join(names)}"
                )
        for name, low, high in (
            ("audio_clips", 1, 1000),
            ("video_clips", 1, 1000),
            ("clip_seconds", 0.05, 60.0),
            ("fps", 1e-3, 1e3),
            ("start", 0.0, 1e9),
            ("end", 1e-3, 1e9),
            ("depth_baseline_m", 1e-6, 1e3),
            ("depth_focal_px", 1e-3, 1e6),
            ("imu_rate_hz", 0.1, 1e6),
            ("imu_start_seconds", 0.0, 1e9),
            ("max_pixels", 1, 2**40),
            ("max_array_bytes", 1, 2**50),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"{name} is {value}", hint=f"it must lie between {low} and {high}")
        if self.end is not None and self.end <= (self.start or 0.0):
            raise UsageError(f"end is {self.end}, which is not after start ({self.start})")

    @classmethod
    def known(cls, values: Mapping[str, Any]) -> MediaOptions:
        """Options of which some values are known; keys of another version are left out.

        Raises:
            UsageError: a value is outside its range, or of another type.
        """
        names = {field.name for field in fields(cls)}
        try:
            return cls(**{key: value for key, value in values.items() if key in names})
        except TypeError as error:
            raise UsageError(f"media options are of a wrong type ({error})") from error

    def stretch(self, duration: float, where: str) -> tuple[float, float]:
        """From which second of a recording to which one may look.

        Raises:
            MediaError: the recording, `where`, ends before.
        """
        start = self.start or 0.0
        if start and start >= duration:
            raise MediaError(f"has {duration:.4g} seconds, and none after {start:.4g}", where=where)
        return start, duration if self.end is None else min(self.end, duration)

    def deciding(self) -> dict[str, Any]:
        """The values that decide a tensor: all but the limits."""
        return {key: value for key, value in asdict(self).items() if key not in _LIMITS}

    def only(self, names: Collection[str]) -> MediaOptions:
        """The same with all but these fields, and the limits, at their defaults."""
        return MediaOptions(**{name: getattr(self, name) for name in {*names, *_LIMITS}})

    def fingerprint(self, modality: str) -> str:
        """A short stable name for this preprocessing of one modality.

        Two options objects with the same fingerprint make the same tensor from the same bytes.
        Limits (`max_pixels`, ...) decide whether there is a tensor, not which, and are left out.

        Raises:
            ValueError: `modality` is not a modality.
        """
        if modality not in MODALITIES:
            raise ValueError(f"{modality!r} is not one of {', '.join(MODALITIES)}")
        values = {name: getattr(self, name) for name in FIELDS[modality]}
        parts = [_text(name, v) for name, v in values.items() if name not in _IF_SAID]
        parts += [f"{name}={float(v)}" for name, v in values.items() if name in _IF_SAID and v]
        return "/".join([modality, f"v{PREPROCESSING_VERSION}", *parts])


def _text(name: str, value: Any) -> str:
    if name == "clip_sampler":
        # the library's sampler and our own spacing of the same kind give the same clips
        return "imagebind" if value == "imagebind" else "chatbind"
    as_float = name in ("clip_seconds", "depth_baseline_m", "depth_focal_px", "imu_rate_hz")
    return str(float(value) if as_float and value is not None else value)

"""Everything a caller may choose about how media files become tensors.

One frozen object travels through the loaders, and `fingerprint` names the choices that change a
modality's tensor, so that stored embeddings are never mixed with others. Where options come from
(command line, model config) is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from chatbind_cli.errors import UsageError
from chatbind_cli.media.modality import MODALITIES

PREPROCESSING_VERSION: Final = 1
"""Raise this when a loader's numbers change for any input."""

CLIP_SAMPLERS: Final = ("imagebind", "chatbind", "pytorchvideo")
DEPTH_UNITS: Final = ("auto", "mm", "m", "disparity", "relative")
ACCEL_UNITS: Final = ("m/s2", "g")
GYRO_UNITS: Final = ("rad/s", "deg/s")


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

    def fingerprint(self, modality: str) -> str:
        """A short stable name for this preprocessing of one modality.

        Two options objects with the same fingerprint make the same tensor from the same bytes.
        Limits (`max_pixels`, ...) decide whether there is a tensor, not which, and are left out.

        Raises:
            ValueError: `modality` is not a modality.
        """
        if modality not in MODALITIES:
            raise ValueError(f"{modality!r} is not one of {', '.join(MODALITIES)}")
        # the library's sampler and our own spacing of the same kind give the same clips
        sampler = "imagebind" if self.clip_sampler == "imagebind" else "chatbind"
        parts: dict[str, tuple[object, ...]] = {
            "image": (),
            "video": (self.video_clips, float(self.clip_seconds), sampler),
            "audio": (self.audio_clips, float(self.clip_seconds), sampler),
            "depth": (self.depth_unit, float(self.depth_baseline_m), float(self.depth_focal_px)),
            "thermal": (),
            "imu": (
                self.imu_rate_hz and float(self.imu_rate_hz),
                self.imu_start_seconds,
                self.imu_accel_unit,
                self.imu_gyro_unit,
            ),
        }
        return "/".join([modality, f"v{PREPROCESSING_VERSION}", *map(str, parts[modality])])

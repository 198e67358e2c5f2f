"""The sizes of an ImageBind model, and the facts that no configuration changes.

A configuration can be read, compared and written without loading torch. The JSON form is that of
the published constructor's arguments, so a file written for the original works here.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.errors import CheckpointError, WeightsError

# Fixed by ImageBind: every published and every toy model takes these inputs.
IMAGE_SIZE = 224
TEXT_CONTEXT = 77
TEXT_VOCABULARY = 49408
AUDIO_MEL_BINS = 128
AUDIO_FRAMES = 204  # of 10 ms: 2 s of sound give 198 to 200, the rest is padding
IMU_CHANNELS = 6
IMU_STEPS = 2000
IMU_SECONDS = 5.0

TOWER_OF = {
    "image": "vision",
    "video": "vision",
    "text": "text",
    "audio": "audio",
    "depth": "depth",
    "thermal": "thermal",
    "imu": "imu",
}
TOWERS = tuple(dict.fromkeys(TOWER_OF.values()))
# What the L2-normalised head output is multiplied by (design: audio 20, depth 5, thermal 10,
# IMU 5; text learns its own, from 1 / 0.07 up to 100). Images and videos stay at norm 1.
FIXED_SCALES = {"audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0}
TEXT_SCALE_START = 1 / 0.07
TEXT_SCALE_MAX = 100.0


@dataclass(frozen=True, kw_only=True)
class ImageBindConfig:
    """Sizes of the six towers; the defaults are those of the published ImageBind-Huge.

    The rates of drop_path are arguments of its constructor that only its training used.

    Source: ImageBind (Girdhar et al., CVPR 2023), section 3.3 and appendix B.
    """

    video_frames: int = 2
    kernel_size: tuple[int, int, int] = (2, 14, 14)  # frames, rows, columns of a vision patch
    out_embed_dim: int = 1024

    vision_embed_dim: int = 1280
    vision_num_blocks: int = 32
    vision_num_heads: int = 16

    text_embed_dim: int = 1024
    text_num_blocks: int = 24
    text_num_heads: int = 16

    audio_kernel_size: int = 16
    audio_stride: int = 10
    audio_embed_dim: int = 768
    audio_num_blocks: int = 12
    audio_num_heads: int = 12
    audio_num_mel_bins: int = AUDIO_MEL_BINS
    audio_target_len: int = AUDIO_FRAMES
    audio_drop_path: float = 0.1

    depth_embed_dim: int = 384
    depth_kernel_size: int = 16
    depth_num_blocks: int = 12
    depth_num_heads: int = 8
    depth_drop_path: float = 0.0

    thermal_embed_dim: int = 768
    thermal_kernel_size: int = 16
    thermal_num_blocks: int = 12
    thermal_num_heads: int = 12
    thermal_drop_path: float = 0.0

    imu_embed_dim: int = 512
    imu_kernel_size: int = 8  # steps of one window
    imu_num_blocks: int = 6
    imu_num_heads: int = 8
    imu_drop_path: float = 0.7
    imu_head_dropout: float = 0.5  # training only; not an argument of the published constructor

    def __post_init__(self) -> None:
        """Checks what arithmetic needs.

        Raises:
            WeightsError: a size is not positive, a rate is outside [0, 1), or sizes do not divide.
        """
        for name, value in self.to_dict().items():
            if name.endswith(("_drop_path", "_dropout")):
                if not 0 <= value < 1:
                    raise WeightsError(f"{name} must be in [0, 1), not {value}")
            elif min(value if isinstance(value, list) else [value]) < 1:
                raise WeightsError(f"{name} must be positive, not {value}")
        for tower in TOWERS:
            width, _, heads = self.trunk(tower)
            if width % heads:
                raise WeightsError(f"{tower}_embed_dim {width} does not divide into {heads} heads")
        if self.video_frames % self.kernel_size[0]:
            raise WeightsError(
                f"video_frames {self.video_frames} does not divide by the"
                f" {self.kernel_size[0]} frames of a patch"
            )

    def trunk(self, tower: str) -> tuple[int, int, int]:
        """Returns (width, blocks, heads) of a tower's transformer."""
        return (
            getattr(self, f"{tower}_embed_dim"),
            getattr(self, f"{tower}_num_blocks"),
            getattr(self, f"{tower}_num_heads"),
        )

    @classmethod
    def from_json(cls, path: Path) -> ImageBindConfig:
        """Returns what a file of the form of `to_json` says; missing keys are Huge's.

        Raises:
            CheckpointError: the file cannot be read as a JSON object.
            WeightsError: an unknown key, a value of another type, or sizes that do not fit.
        """
        known = {field.name: field.default for field in fields(cls)}
        settings: dict[str, Any] = {}
        values = read_json(path)
        try:
            for name, value in values.items():
                if name not in known:
                    raise WeightsError(f"{name!r} is no setting of ImageBind")
                settings[name] = _typed(name, value, known[name])
            return cls(**settings)
        except WeightsError as error:
            raise WeightsError(error.what, where=str(path)) from error

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as JSON values."""
        return {**asdict(self), "kernel_size": list(self.kernel_size)}

    def to_json(self) -> str:
        """Returns the settings as an indented JSON text that `from_json` reads back."""
        return json.dumps(self.to_dict(), indent=1) + "\n"


HUGE = ImageBindConfig()


def is_imagebind_config(path: Path) -> bool:
    """Returns whether a file has the form of an encoder's config.json.

    Mirrors of the published weights carry a config.json of other libraries beside them, which
    says nothing about sizes: those weights are Huge.
    """
    try:
        return "vision_embed_dim" in read_json(path, missing_ok=True)
    except CheckpointError:
        return False


def _typed(name: str, value: Any, example: Any) -> Any:
    if isinstance(example, tuple):
        if (
            isinstance(value, list)
            and len(value) == len(example)
            and all(type(v) is int for v in value)
        ):
            return tuple(value)
        raise WeightsError(f"{name} must be {len(example)} whole numbers")
    if isinstance(example, float) and type(value) in (int, float):
        return float(value)
    if type(value) is not type(example):
        kind = "a number" if isinstance(example, float) else "a whole number"
        raise WeightsError(f"{name} must be {kind}, not {value!r}")
    return value

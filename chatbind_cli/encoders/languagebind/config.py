"""What config.json says of a LanguageBind repository, and which repositories a path means.

Read without loading torch. A repository is one modality: a whole CLIP whose vision tower reads
pictures, frames, filter banks, depth or heat, and the text tower that all of them share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.errors import CheckpointError, WeightsError

MODALITIES = ("image", "video", "audio", "depth", "thermal")
VOCABULARY = 49408
"""Of CLIP's byte pairs."""

_KINDS = {f"languagebind{modality}": modality for modality in MODALITIES}
"""What config.json calls a repository, by modality."""

_MOST = 1_000_000
_MOST_FRAMES = 64
_MOST_PIXELS = 2**24
"""Of all frames together: forty times what the published tower for films reads."""
_MOST_PATCHES = 2**13
_MOST_PLACES = 1024
_ACTIVATIONS = ("gelu", "quick_gelu")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Sizes of a text tower, under the names and with the defaults of the published class."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    vocab_size: int = VOCABULARY
    max_position_embeddings: int = 77


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of the tower of a modality and of what it reads; likewise."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    image_size: int = 224
    patch_size: int = 32
    add_time_attn: bool = False
    num_frames: int = 1
    clip_type: str = "vl"
    """`vl_new`: patches have an axis of time, of length 1, and each frame its own class token."""
    tube_size: int = 1
    """That length; `vl` does not look at it."""
    lora_r: int = 16
    lora_alpha: float = 16.0
    num_mel_bins: int = 0
    target_length: int = 0
    audio_sample_rate: int = 16_000
    audio_mean: float = 0.5
    audio_std: float = 0.5
    max_depth: float = 10.0
    """Metres; 0: the largest depth of each map."""

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of what it reads."""
        if self.num_mel_bins and self.target_length:
            return self.num_mel_bins, self.target_length
        return self.image_size, self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.sides[0] // self.patch_size, self.sides[1] // self.patch_size


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A folder with the weights of one modality, and what its config.json says."""

    folder: Path
    modality: str
    projection_dim: int
    vision: VisionConfig
    text: TextConfig


def is_languagebind(path: Path) -> bool:
    """Whether a path means LanguageBind: a repository, its weights, or a folder with several."""
    if not path.is_dir():
        return path.is_file() and _modality(path.parent) is not None
    # ImageBind's weights may lie in a folder with others' folders
    return _modality(path) is not None or bool(_inside(path) and not _holds_weights(path))


def find_repositories(folder: Path) -> dict[str, Repository]:
    """The repositories that a folder means, by modality, in the order of `MODALITIES`.

    Raises:
        WeightsError: there are two of a modality, or of different widths.
        CheckpointError: a config.json is broken.
    """
    folders = [folder] if _modality(folder) else _inside(folder)
    if folders != [folder]:
        for part in folder.iterdir():  # a broken one would be a modality less, without a word
            read_json(part / "config.json", missing_ok=True)
    found: dict[str, Repository] = {}
    for part in folders:
        repository = _read(part)
        other = found.setdefault(repository.modality, repository)
        if other is not repository:
            raise WeightsError(
                f"{other.folder.name} and {part.name} are both for {repository.modality}",
                where=str(folder),
                hint="leave one a modality in the folder",
            )
    first = next(iter(found.values()))
    for repository in found.values():
        if repository.projection_dim != first.projection_dim:
            raise WeightsError(
                f"{first.folder.name} gives embeddings of width {first.projection_dim}, "
                f"{repository.folder.name} of width {repository.projection_dim}: another space",
                where=str(folder),
            )
    return {modality: found[modality] for modality in MODALITIES if modality in found}


def _holds_weights(folder: Path) -> bool:
    return any(part.suffix in (".safetensors", ".pth", ".pt", ".bin") for part in folder.iterdir())


def _inside(folder: Path) -> list[Path]:
    return [part for part in sorted(folder.iterdir()) if part.is_dir() and _modality(part)]


def _modality(folder: Path) -> str | None:
    """The modality of a repository; None: the folder is none."""
    try:
        config = read_json(folder / "config.json", missing_ok=True)
    except CheckpointError:
        return None
    return _KINDS.get(str(config.get("model_type")).lower())


def _read(folder: Path) -> Repository:
    path = folder / "config.json"
    config = read_json(path)
    parts = []
    for key, form in (("vision_config", VisionConfig), ("text_config", TextConfig)):
        values = config.get(key)
        if not isinstance(values, dict):
            raise WeightsError(f"has no {key}", where=str(path))
        parts.append(_typed(form, values, f"{path}: {key}"))
    vision, text = parts
    dim = _whole("projection_dim", config.get("projection_dim", 512), 1, str(path))
    modality = str(_modality(folder))
    if modality == "audio" and not (vision.num_mel_bins and vision.target_length):
        raise WeightsError("says no num_mel_bins and target_length", where=str(path))
    if modality != "video" and (vision.add_time_attn or vision.clip_type != "vl"):
        raise WeightsError(f"is of {modality}, and has frames in time", where=str(path))
    return Repository(
        folder=folder, modality=modality, projection_dim=dim, vision=vision, text=text
    )


def _typed(form: type[Any], values: dict[str, Any], where: str) -> Any:
    """The settings that a form knows, checked; others (of training) are left alone."""
    known: dict[str, Any] = {}
    for field in fields(form):
        name, default = field.name, field.default
        value = values.get(name)
        if value is None:
            continue
        if isinstance(default, str):
            known[name] = value
        elif isinstance(default, bool):
            known[name] = value is True
        elif isinstance(default, int):
            known[name] = _whole(name, value, 0, where)
        elif type(value) in (int, float) and abs(value) < _MOST:
            known[name] = float(value)
        else:
            raise WeightsError(f"{name} is {value!r:.40}", where=where)
    made = form(**known)
    if made.hidden_act not in _ACTIVATIONS:
        raise WeightsError(f"hidden_act is {made.hidden_act!r:.40}", where=where)
    if min(made.num_attention_heads, made.hidden_size, made.intermediate_size) < 1:
        raise WeightsError("has sizes of 0", where=where)
    if made.hidden_size % made.num_attention_heads:
        raise WeightsError(
            f"hidden_size {made.hidden_size} does not divide into {made.num_attention_heads} heads",
            where=where,
        )
    if form is VisionConfig:
        _check_vision(made, where)
    elif not 2 <= made.max_position_embeddings <= _MOST_PLACES:
        raise WeightsError(
            f"max_position_embeddings is {made.max_position_embeddings}", where=where
        )
    return made


def _check_vision(config: VisionConfig, where: str) -> None:
    if config.clip_type != "vl" and (config.clip_type != "vl_new" or config.tube_size != 1):
        raise WeightsError(
            f"clip_type {config.clip_type!r:.40} with tube_size {config.tube_size} is not known",
            where=where,
        )
    if not 1 <= config.num_frames <= _MOST_FRAMES:
        raise WeightsError(f"num_frames is {config.num_frames}", where=where)
    if not 1 <= config.patch_size <= config.image_size or 0 in config.grid:
        raise WeightsError(f"patch_size is {config.patch_size}", where=where)
    pixels = config.num_frames * math.prod(config.sides)
    if pixels > _MOST_PIXELS or math.prod(config.grid) > _MOST_PATCHES:
        raise WeightsError(
            f"reads {pixels:,} pixels in {math.prod(config.grid):,} patches, as no tower does",
            where=where,
        )
    if config.audio_std <= 0 or config.max_depth < 0 or config.audio_sample_rate < 1000:
        raise WeightsError("has impossible numbers for sound or depth", where=where)


def _whole(name: str, value: Any, least: int, where: str) -> int:
    """A whole number, which the published files may write as 0.0."""
    if type(value) not in (int, float) or value != value // 1 or not least <= value <= _MOST:
        raise WeightsError(f"{name} is {value!r:.40}", where=where)
    return int(value)

"""An encoder's weights on disk: finding them, checking them against a config, reading one tower.

Reads the published `.pth` (without running code of the file, memory-mapped) and `.safetensors`
with the same key names; writes `.safetensors`. Nothing but the tensors that are asked for is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from chatbind_cli.checkpoints.checkpoint import open_tensor_file
from chatbind_cli.encoders.imagebind.config import (
    HUGE,
    TOWER_OF,
    TOWERS,
    ImageBindConfig,
    is_imagebind_config,
)
from chatbind_cli.encoders.imagebind.model import ImageBind
from chatbind_cli.encoders.weights import check_blocks, check_shapes, map_tensors
from chatbind_cli.errors import WeightsError, reason
from chatbind_cli.files import replace_file, replace_text

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "imagebind.safetensors"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# which file of a folder that holds several is the encoder
_USUAL_NAMES = (
    WEIGHTS_NAME,
    "imagebind_huge.safetensors",
    "model.safetensors",
    "imagebind_huge.pth",
)


def find_encoder(path: Path) -> tuple[Path, ImageBindConfig]:
    """Returns the weights file that a path means, and the sizes that it must have.

    Args:
        path: a weights file (Huge, unless an encoder's config.json lies beside it) or a folder
            that holds weights and, unless they are Huge, config.json.

    Raises:
        WeightsError: nothing there, or the config is broken.
    """
    weights = _weights_in(path) if path.is_dir() else path
    if not weights.is_file():
        raise WeightsError(
            "no such encoder",
            where=str(path),
            hint="give ImageBind's weights file, or a folder with weights and config.json",
        )
    config_path = weights.parent / CONFIG_NAME
    own = is_imagebind_config(config_path)
    return weights, ImageBindConfig.from_json(config_path) if own else HUGE


def check_towers(path: Path, config: ImageBindConfig) -> tuple[str, ...]:
    """Returns the towers that a weights file holds, after comparing every key and shape.

    Raises:
        WeightsError: the file cannot be read, holds no tower, or does not fit the config; the
            first key that differs is named with both shapes.
    """
    # by a reader that trusts nothing in the file
    tensors = open_tensor_file(path).tensors
    shapes = {key: info.shape for key, info in tensors.items()}
    present = {_tower_of_key(key) for key in shapes}
    towers = tuple(tower for tower in TOWERS if tower in present)
    blocks = sum(config.trunk(tower)[1] for tower in towers)
    check_blocks(blocks, len(shapes), str(path), "ImageBind")
    try:
        wanted = expected_shapes(config, towers) if towers else {}
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise WeightsError(
            f"the config's sizes make no model ({reason(error)})",
            where=str(path),
        ) from error
    check_shapes(shapes, wanted, str(path), "ImageBind")
    if not towers:
        raise WeightsError("holds no tensors", where=str(path))
    return towers


def expected_shapes(config: ImageBindConfig, towers: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every state-dict entry of these towers."""
    return {key: tuple(tensor.shape) for key, tensor in _blank(config, towers).state_dict().items()}


def load_tower(
    path: Path, config: ImageBindConfig, tower: str, *, device: torch.device, dtype: torch.dtype
) -> ImageBind:
    """Returns an ImageBind of one tower, frozen and in eval mode; no other tower is read.

    On the CPU, in the dtype of the file, the weights stay memory-mapped: processes share them.

    Raises:
        WeightsError: the file cannot be read, or its tensors are no floating-point numbers.
    """
    model = _blank(config, [tower])
    weights = map_tensors([open_tensor_file(path)], model.state_dict())
    model.load_state_dict({k: v.to(device, dtype) for k, v in weights.items()}, assign=True)
    return model.requires_grad_(False).eval()


def save_encoder(model: ImageBind, config: ImageBindConfig, folder: Path) -> None:
    """Writes config.json and imagebind.safetensors, what `open_encoder(folder)` reads.

    Args:
        model: any towers; those that it lacks cannot be used after loading.
        config: the sizes the model was built with.
        folder: made if need be; the two files in it are replaced.
    """
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with replace_file(folder / WEIGHTS_NAME) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    replace_text(folder / CONFIG_NAME, config.to_json())


def _blank(config: ImageBindConfig, towers: Iterable[str]) -> ImageBind:
    wanted = set(towers)
    modalities = [modality for modality, tower in TOWER_OF.items() if tower in wanted]
    with torch.device("meta"):
        return ImageBind(config, modalities)


def _weights_in(folder: Path) -> Path:
    files = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    for name in _USUAL_NAMES:
        if folder / name in files:
            return folder / name
    if len(files) != 1:
        listed = ", ".join(path.name for path in files[:6]) or "none"
        raise WeightsError(
            f"this folder must hold one weights file, not {len(files)} ({listed})",
            where=str(folder),
            hint="give the file itself",
        )
    return files[0]


def _tower_of_key(key: str) -> str:
    parts = key.split(".")
    return parts[1] if len(parts) > 1 else ""

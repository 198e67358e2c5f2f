"""One tower of a LanguageBind repository: checked against its config, read, LoRA merged."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from chatbind_cli.checkpoints.checkpoint import open_checkpoint
from chatbind_cli.encoders.languagebind.config import Repository, VisionConfig
from chatbind_cli.encoders.languagebind.model import TextTower, VisionTower
from chatbind_cli.encoders.weights import check_blocks, check_shapes, map_tensors

_WRAPPERS = (".base_model.model.", ".base_layer.")
"""What PEFT puts into names."""

_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"
_TABLE = "vision_model.embeddings.position_embedding.weight"
_OTHERS = ".position_ids"
"""Counted through, and written by older versions of transformers."""


def check_repository(repository: Repository) -> None:
    """Compares every key and shape with the config, and reads nothing else.

    Raises:
        WeightsError: the first key that differs is named with both shapes.
        CheckpointError: there are no weights.
    """
    with open_checkpoint(repository.folder) as file:
        blocks = repository.vision.num_hidden_layers + repository.text.num_hidden_layers
        check_blocks(blocks, len(file.tensors), str(repository.folder), "LanguageBind")
        shapes = {_plain(name): info.shape for name, info in file.tensors.items()}
    found = {name: shape for name, shape in shapes.items() if not name.endswith(_OTHERS)}
    wanted = {
        name: tuple(tensor.shape)
        for text in (False, True)
        for name, tensor in _blank(repository, text=text).state_dict().items()
    }
    square = (1 + _side(repository.vision) ** 2, *wanted[_TABLE][1:])
    if found.get(_TABLE) == square:
        wanted[_TABLE] = square
    adapted = {name.removesuffix(_A).removesuffix(_B) for name in found if name.endswith((_A, _B))}
    for stem in adapted:
        matrix, rank = wanted.get(f"{stem}.weight", ()), repository.vision.lora_r
        if rank and len(matrix) == 2:
            wanted[stem + _A], wanted[stem + _B] = (rank, matrix[1]), (matrix[0], rank)
    check_shapes(found, wanted, str(repository.folder), "LanguageBind")


def load_tower(
    repository: Repository, *, text: bool, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """The vision or the text tower of a checked repository, frozen; the other is not read.

    On the CPU, in the dtype of the file, what LoRA has not changed stays memory-mapped: processes
    share it.

    Raises:
        WeightsError: the file cannot be read, or its tensors are no floating-point numbers.
    """
    model = _blank(repository, text=text)
    own = model.state_dict()
    files = open_checkpoint(repository.folder).files
    plain = {name: _plain(name) for file in files for name in file.tensors}
    wanted = [n for n, told in plain.items() if told in own or told.endswith((_A, _B))]
    found = {plain[name]: tensor for name, tensor in map_tensors(files, wanted).items()}
    for name in own:
        value = _whole(found, name, repository.vision)
        own[name] = value.to(device, dtype if value.ndim else torch.float32)  # the scale's log
    model.load_state_dict(own, assign=True)
    return model.requires_grad_(False).eval()


def _whole(found: Mapping[str, torch.Tensor], name: str, config: VisionConfig) -> torch.Tensor:
    """A tensor with what LoRA has learned added.

    Source: Hu et al., "LoRA", 2021: W + alpha / r * B A.
    """
    value, stem = found[name], name.removesuffix(".weight")
    if name == _TABLE and len(value) != 1 + math.prod(config.grid):
        return _fitted(value, config)
    if stem + _A not in found:
        return value
    learned = found[stem + _B].float() @ found[stem + _A].float()
    return value.float() + config.lora_alpha / config.lora_r * learned


def _fitted(table: torch.Tensor, config: VisionConfig) -> torch.Tensor:
    """The places of square pictures [1 + side^2, d] for the grid of a filter bank."""
    places = table[1:].float().T.unflatten(1, (_side(config), -1))
    fitted = functional.interpolate(
        places[None], size=config.grid, mode="bicubic", antialias=True, align_corners=False
    )
    return torch.cat([table[:1].float(), fitted[0].flatten(1).T])


def _side(config: VisionConfig) -> int:
    return config.image_size // config.patch_size


def _blank(repository: Repository, *, text: bool) -> nn.Module:
    dim = repository.projection_dim
    with torch.device("meta"):
        if text:
            return TextTower(repository.text, dim)
        return VisionTower(repository.vision, dim)


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, ".")
    return name

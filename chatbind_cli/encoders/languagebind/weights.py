"""One tower of a LanguageBind repository: checked against its config, read, LoRA merged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from chatbind_cli.checkpoints.checkpoint import Checkpoint, open_checkpoint
from chatbind_cli.encoders.languagebind.config import Repository
from chatbind_cli.encoders.languagebind.model import TextTower, VisionTower
from chatbind_cli.errors import WeightsError

_WRAPPERS = (".base_model.model.", ".base_layer.")
"""What PEFT puts into names."""

_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"
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
        if blocks > len(file.tensors):
            raise WeightsError(
                f"the config wants {blocks} blocks, and the file has {len(file.tensors)} tensors",
                where=str(repository.folder),
            )
        found = {_plain(name): info.shape for name, info in file.tensors.items()}
    wanted = {
        name: tuple(tensor.shape)
        for text in (False, True)
        for name, tensor in _blank(repository, text=text).state_dict().items()
    }
    adapted = {name.removesuffix(_A).removesuffix(_B) for name in found if name.endswith((_A, _B))}
    for stem in adapted:
        matrix, rank = wanted.get(f"{stem}.weight", ()), repository.vision.lora_r
        wanted[stem + _A], wanted[stem + _B] = (rank, *matrix[1:]), (*matrix[:1], rank)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name) and not name.endswith(_OTHERS):
            raise WeightsError(
                f"{name} is {_told(found.get(name))} in the file and {_told(wanted.get(name))} "
                "by the config",
                where=str(repository.folder),
                hint="are these LanguageBind's weights, and the config.json that belongs to them?",
            )


def load_tower(
    repository: Repository, *, text: bool, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """The vision or the text tower of a checked repository, frozen; the other is not read.

    Raises:
        WeightsError: the file cannot be read, or its tensors are no floating-point numbers.
    """
    model = _blank(repository, text=text)
    with open_checkpoint(repository.folder) as file:
        names = {_plain(name): name for name in file.tensors}
        state = {name: _read(file, names, name, repository) for name in model.state_dict()}
    for name, value in state.items():
        state[name] = value.to(device, dtype if value.ndim else torch.float32)  # the scale's log
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def _read(
    file: Checkpoint, names: Mapping[str, str], name: str, repository: Repository
) -> torch.Tensor:
    """A tensor in float32, what LoRA has learned added.

    Source: Hu et al., "LoRA", 2021: W + alpha / r * B A.
    """

    def tensor(plain: str) -> torch.Tensor:
        value = file.read(names[plain])
        if not value.is_floating_point():
            raise WeightsError(f"{plain} holds {value.dtype}", where=str(repository.folder))
        return value.float()

    value = tensor(name)
    stem = name.removesuffix(".weight")
    if stem + _A in names:
        scale = repository.vision.lora_alpha / repository.vision.lora_r
        value += scale * (tensor(stem + _B) @ tensor(stem + _A))
    return value


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


def _told(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))

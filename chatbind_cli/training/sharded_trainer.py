"""The Trainer of transformers, for models that may be shared out over processes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer

from chatbind_cli.errors import CheckpointError, reason
from chatbind_cli.training.saved import check_shards
from chatbind_cli.training.sharding import is_sharded

SHARDS: Final = "shards"  # the folder in a checkpoint; others have `WEIGHTS` and `_OPTIMIZER`
WEIGHTS: Final = "trained.safetensors"
_OPTIMIZER, _SCHEDULER = "optimizer.pt", "scheduler.pt"
_TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True)


class ShardedTrainer(Trainer):
    """A Trainer that also knows models which are shared out, and their checkpoints.

    Checkpoints of either kind are read whether the model is shared out now, and over however
    many processes.
    """

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def _get_grad_norm(
        self, model: nn.Module, grad_norm: torch.Tensor | float | None = None
    ) -> torch.Tensor | float | None:
        norm: torch.Tensor | float | None = super()._get_grad_norm(model, grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.trained):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        weights = get_model_state_dict(self.trained, options=_TRAINED_ONLY)
        state = {"model": weights, "optimizer": self._optimizer_state()}
        folder = Path(output_dir) / SHARDS
        try:
            save_parts(state, checkpoint_id=folder)
        except CheckpointException as error:
            raise _cause(error) from error
        check_shards(folder, self.args.process_index)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder, model = Path(resume_from_checkpoint), self.trained
        if (folder / SHARDS).is_dir():
            state = {"model": get_model_state_dict(model, options=_TRAINED_ONLY)}
            _load(state, folder)
            options = StateDictOptions(ignore_frozen_params=True, strict=False)
            set_model_state_dict(model, state["model"], options=options)
        else:
            _load_whole(model, folder / WEIGHTS)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder, optimizer = Path(checkpoint), _inner(self.optimizer)
        if (folder / SHARDS).is_dir():
            state = {"optimizer": self._optimizer_state()}
            _load(state, folder)
            set_optimizer_state_dict(
                self.trained, optimizer, state["optimizer"], options=_TRAINED_ONLY
            )
        elif is_sharded(self.trained):
            _load_whole_optimizer(optimizer, folder / _OPTIMIZER)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.lr_scheduler is not None
        schedule = torch.load(folder / _SCHEDULER, weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)

    @property
    def trained(self) -> nn.Module:
        """The model."""
        assert self.model is not None
        return self.model

    def _optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state by the parameters' names; made, where it has none yet."""
        optimizer = _inner(self.optimizer)
        return get_optimizer_state_dict(self.trained, optimizer, options=_TRAINED_ONLY)


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that accelerate's one stands before."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _load(state: dict[str, Any], folder: Path) -> None:
    """Reads this process's parts, however they were cut when they were saved.

    Raises:
        CheckpointError: the checkpoint is not of this model.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it may be
            load_parts(state, checkpoint_id=folder / SHARDS)
    except CheckpointException as error:
        raise CheckpointError(
            f"does not fit the model ({reason(_cause(error))})", where=str(folder)
        ) from error


def _cause(error: CheckpointException) -> BaseException:
    """What went wrong first, of whatever process; PyTorch's own error is no `Exception`."""
    return next((cause for cause, _ in error.failures.values()), error)


def _load_whole(model: nn.Module, file: Path) -> None:
    """Reads weights that were saved whole.

    Raises:
        CheckpointError: they are not those that train now.
    """
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with safe_open(file, "pt") as saved, torch.no_grad():
        shapes = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
        for name in sorted(shapes.keys() | wanted.keys()):
            if name not in wanted or shapes.get(name) != tuple(wanted[name].shape):
                raise CheckpointError(
                    f"does not fit: {name} is not the same in the checkpoint and the model",
                    where=str(file.parent),
                )
            wanted[name].copy_(_cut(saved.get_tensor(name), wanted[name]))


def _load_whole_optimizer(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Reads an optimizer's state that was saved whole, of which each process takes its part."""
    saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in saved["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameters[index].shape:
                values[key] = _cut(value, parameters[index])
    optimizer.load_state_dict(saved)


def _cut(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A process's part of a tensor that every process has."""
    if not isinstance(like, DTensor):
        return whole
    mesh, places = like.device_mesh, like.placements
    return distribute_tensor(whole.to(like.device), mesh, places, src_data_rank=None)

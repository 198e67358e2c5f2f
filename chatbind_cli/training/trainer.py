"""The Trainer of transformers, with checkpoints that are small, and whole or not there at all.

A checkpoint holds the parameters that train (not the frozen ones), the optimizer, the scheduler,
every process's random state and the step. It grows in a staging folder and gets its name last.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer

from chatbind_cli.errors import CheckpointError
from chatbind_cli.training.rundir import STAGING, RunFolder

WEIGHTS: Final = "trained.safetensors"


class ChatBindTrainer(Trainer):
    """A Trainer that saves what trains.

    Args:
        folder: the run's folder.
        keep: how many checkpoints stay; None for all.
        write_more: writes into a checkpoint what others read from it, on the first process.
        **kwargs: see `transformers.Trainer`.
    """

    def __init__(
        self,
        *,
        folder: RunFolder,
        keep: int | None,
        write_more: Callable[[Path], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._folder = folder
        self._keep = keep
        self._write_more = write_more

    @property
    def trained(self) -> nn.Module:
        """The model, which `transformers.Trainer` may also make late."""
        assert self.model is not None
        return self.model

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(super()._get_output_dir(trial)) / STAGING)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        # every process has written its random state before the folder may count as complete
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            staged = self._folder.path / STAGING / f"checkpoint-{self.state.global_step}"
            if self._write_more is not None:
                self._write_more(staged)
            self._folder.publish_checkpoint(staged, self._keep)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes what trains into a checkpoint; sharded weights go with the optimizer's."""
        if self.is_fsdp_enabled or not self.args.should_save or output_dir is None:
            return
        trained = {
            name: parameter.detach().cpu().contiguous()
            for name, parameter in self.trained.named_parameters()
            if parameter.requires_grad
        }
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file(trained, Path(output_dir) / WEIGHTS)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        model = self.trained if model is None else model
        saved = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        wanted = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
        for name in sorted(saved.keys() | wanted.keys()):
            if name not in saved or saved[name].shape != wanted.get(name):
                raise CheckpointError(
                    f"does not fit: {name} is not the same in the checkpoint and the model",
                    where=resume_from_checkpoint,
                )
        model.load_state_dict(saved, strict=False)

    def load_finished(self, checkpoint: Path) -> None:
        """Loads the checkpoint of the last step, after which there is nothing left to train."""
        if self.is_fsdp_enabled:
            # a sharded model is prepared together with its optimizer, or not at all
            model, _ = self.accelerator.prepare(self.model, self.create_optimizer())
            self.model = self.model_wrapped = model
        self._load_from_checkpoint(str(checkpoint), self.trained)

    def gathered_state(self) -> dict[str, torch.Tensor]:
        """The whole model's weights; empty on other processes than the first."""
        if self.is_fsdp_enabled:
            state: dict[str, torch.Tensor] = self.accelerator.get_state_dict(self.model_wrapped)
            return state if self.args.should_save else {}
        return dict(self.trained.state_dict()) if self.args.should_save else {}

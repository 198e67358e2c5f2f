"""Tensors as transformers takes them: each is read, and checked, when it is asked for."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch

from chatbind_cli.checkpoints.checkpoint import Checkpoint
from chatbind_cli.encoders.weights import map_tensors
from chatbind_cli.errors import WeightsError


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is indexed: transformers has slices of safetensors so.

    Attributes:
        checkpoint: where it is.
        name: what it is called there.
        mapped: its numbers on the disk, which processes share; None: it has no floating point.
        lock: held while one is read.
    """

    checkpoint: Checkpoint
    name: str
    mapped: torch.Tensor | None
    lock: threading.Lock

    def __getitem__(self, index: Any) -> torch.Tensor:
        """The tensor, or a part of it.

        Raises:
            WeightsError: it is not finite, or of numbers that no model has.
        """
        value, where = self.mapped, str(self.checkpoint.path)
        if value is None:
            kind = self.checkpoint.info(self.name).dtype
            if kind != torch.int64:  # what counts something
                raise WeightsError(f"{self.name} holds {kind}", where=where)
            with self.lock:  # a checkpoint is read by one thread at a time
                value = self.checkpoint.read(self.name)
        total = value.sum(dtype=torch.float32)
        if total.isnan() or (value.ndim and total.isinf()):  # limits alone may be infinite
            raise WeightsError(f"{self.name} holds NaN or infinity", where=where)
        made: torch.Tensor = value[index]
        return made


def open_tensors(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint, none of which is read.

    Raises:
        WeightsError: a file cannot be mapped.
    """
    infos = checkpoint.tensors.items()
    numbers = [name for name, info in infos if info.dtype.is_floating_point]
    mapped, lock = map_tensors(checkpoint.files, numbers), threading.Lock()
    return {name: LazyTensor(checkpoint, name, mapped.get(name), lock) for name, _ in infos}

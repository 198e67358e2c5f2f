"""Activations computed twice to save memory (gradient checkpointing), where memory asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedModel

from chatbind_cli.console import note

ROOM: Final = 0.9
"""The share of a device's memory that a step may take: what is freed is not all free at once."""

_OPTIMIZER: Final = 8  # AdamW's two moments in float32
_GIB: Final = 2**30


class GpuMemory:
    """What is asked of a GPU's memory, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def begin(self) -> int:
        """How much tensors take now; the highest is counted from here on."""
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def highest(self) -> int:
        """The most that tensors have taken since."""
        return torch.cuda.max_memory_allocated(self._device)

    def room(self) -> int:
        """What there is for this process's tensors in all."""
        return torch.cuda.mem_get_info(self._device)[0] + torch.cuda.memory_reserved(self._device)


def recomputes(model: nn.Module) -> bool:
    """Whether any layer computes its activations twice."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def recompute(model: PreTrainedModel) -> None:
    """Has the layers of a model compute their activations twice from here on."""
    # transformers calls it this since lately
    newer = getattr(model, "activation_checkpointing_enable", None)
    enable = newer or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


class Trial:
    """Finds out in the first step whether activations fit into memory.

    A forward and backward pass of the first batch is measured. From it follows what the largest
    batch needs: activations grow with the positions. A pass on one process must not wait for the
    others, which may run out of memory: sharded models cannot be tried.

    Args:
        model: the one that trains, not wrapped.
        memory: of its device.
        rows: of the largest batch.
        length: of its longest sample, in tokens.
        agreed: whether any process says yes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        memory: GpuMemory,
        rows: int,
        length: int,
        agreed: Callable[[bool], bool],
    ) -> None:
        self._model, self._memory = model, memory
        self._rows, self._length, self._agreed = rows, length, agreed

    def __call__(self, batch: dict[str, Any], prefix: int = 0) -> None:
        """Tries a batch, and turns recomputation on if it has to be.

        Args:
            batch: as the model takes it.
            prefix: how many positions have been cut off its rows.
        """
        needed = self._needed(batch, self._rows * (self._length - prefix))
        room = self._memory.room()
        if self._agreed(needed is None or needed > ROOM * room):
            recompute(self._model)
            much = "is more than there is" if needed is None else f"is {needed / _GIB:.1f} GiB"
            note(
                "gradient checkpointing is on, since the memory of a step without it "
                f"{much}, of {room / _GIB:.1f} GiB (see --gradient-checkpointing)"
            )

    def _needed(self, batch: dict[str, Any], positions: int) -> float | None:
        """Bytes that the largest batch takes in a later step; None if this one is too much."""
        before = self._memory.begin()
        device = batch["input_ids"].device
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                self._model(**batch).loss.backward()
        except torch.OutOfMemoryError:
            return None
        finally:
            self._model.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        trained = sum(p.numel() for p in self._model.parameters() if p.requires_grad)
        grows = max(1.0, positions / batch["input_ids"].numel())
        return before + (self._memory.highest() - before) * grows + _OPTIMIZER * trained

"""Looks at every step's loss and gradient before the optimizer sees it, on all processes at once.

A step that is no number any more spoils the weights, and every checkpoint after them. What is asked
of the device is asked once a step, and with it whether any process was told to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chatbind_cli.data.conversations import Conversations
from chatbind_cli.errors import ChatBindError, Interrupted

# the scale of a GradScaler starts at 2^16 and is halved each time
_SKIPPED_IN_A_ROW: Final = 25
_NAMED: Final = 8


class Watch(TrainerCallback):
    """Of one training run; as a callback it saves and ends the run that was told to stop.

    Args:
        conversations: what is trained on.
        total: adds tensors up over all processes.
        scaled: whether gradients are scaled (float16): then steps that overflow are left out, and
            only many in a row are an error.
    """

    def __init__(
        self,
        conversations: Conversations,
        total: Callable[[torch.Tensor], torch.Tensor],
        *,
        scaled: bool = False,
    ) -> None:
        self._conversations = conversations
        self._total = total
        self._scaled = scaled
        self._skipped = 0
        self._samples: list[Sequence[int]] = []
        self._losses: list[torch.Tensor] = []
        self._told = False

    def begin(self, samples: Sequence[Sequence[int]]) -> None:
        """A step begins.

        Args:
            samples: numbers of the conversations in each of this process's batches.
        """
        self._samples = list(samples)
        self._losses = []

    def saw(self, loss: torch.Tensor) -> torch.Tensor:
        """Takes note of a batch's loss, without waiting for it; returns what is to be logged."""
        self._losses.append(loss.detach().float())
        # one that is left out would make all sums that are logged after it no numbers, too
        return loss.nan_to_num(0, 0, 0) if self._scaled else loss

    def check(self, norm: torch.Tensor | float | None, step: int, *, stop: bool) -> None:
        """Looks at the step's losses and its gradient's norm; the one wait for the device.

        Args:
            norm: of the gradient; None where nobody knows it.
            step: its number.
            stop: whether this process was told to stop; then all will.

        Raises:
            ChatBindError: one of them is not a finite number, on any process.
        """
        losses = torch.stack(self._losses)
        whole = torch.as_tensor(0.0 if norm is None else norm, device=losses.device)
        stops = torch.full((), float(stop), device=losses.device)
        spoilt = [~torch.isfinite(losses).all(), ~torch.isfinite(whole.float())]
        found = self._total(torch.stack([*(flag.float() for flag in spoilt), stops]))
        of_loss, of_norm, told = found.tolist()
        self._told = bool(told)
        self._skipped = self._skipped + 1 if of_loss or of_norm else 0
        if self._skipped and (not self._scaled or self._skipped >= _SKIPPED_IN_A_ROW):
            self._refuse("loss" if of_loss else "gradient", step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Asks for a checkpoint where the run is to stop; after the last step it just ends."""
        self._told = self._told and state.global_step < state.max_steps
        if self._told:
            control.should_log = control.should_save = True
            control.should_evaluate = False  # there may be little time

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Ends the run with its last checkpoint.

        Raises:
            Interrupted: it was told to stop.
        """
        if self._told:
            raise Interrupted(
                f"told to stop after step {state.global_step:,} of {state.max_steps:,}, of which "
                "there is a checkpoint",
                hint="the same command goes on from it",
            )

    def _refuse(self, what: str, step: int) -> None:
        """Ends training; every process names the same records."""
        fine = [what == "loss" and bool(torch.isfinite(loss)) for loss in self._losses]
        batches = zip(self._samples, fine, strict=True)
        mine = [self._place(i) for samples, good in batches if not good for i in samples]
        places: list[str] = gather_object(mine)
        named = ", ".join(places[:_NAMED])
        if len(places) > _NAMED:
            named += f" and {len(places) - _NAMED} more"
        steps = f"of {self._skipped} steps in a row, up to" if self._skipped > 1 else "at"
        raise ChatBindError(
            f"the {what} is not a number any more {steps} step {step} (its samples: {named})",
            hint="nothing was saved since the last checkpoint; try a smaller --learning-rate, a "
            "longer --warmup-ratio, or --bf16 instead of --fp16, and look at these samples",
        )

    def _place(self, index: int) -> str:
        conversation = self._conversations[index]
        if conversation.id == conversation.where:
            return conversation.where
        return f"{conversation.where} (id {conversation.id})"

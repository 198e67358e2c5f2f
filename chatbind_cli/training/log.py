"""What a training run tells while it works: JSON lines for programs, plain lines for people.

A callback of the Trainer; it writes to stdout and to the run's `log.jsonl`, on the first process
only. Knows nothing of models.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chatbind_cli.artifacts import emit_record
from chatbind_cli.errors import ChatBindError
from chatbind_cli.jsonl import Record, dumps

# what the Trainer tells once at the end goes into the artefact record instead
_SUMMARY = "train_runtime"
_ORDER = ("loss", "eval_loss", "learning_rate", "grad_norm", "epoch")


class TrainingLog(TrainerCallback):
    """Writes a record every time the Trainer logs.

    Args:
        path: the log file, continued if it is there.
        samples_per_step: samples in a global batch.
        first: whether this process is the one that writes.
    """

    def __init__(self, path: Path, *, samples_per_step: int, first: bool) -> None:
        self._path = path
        self._samples = samples_per_step
        self._first = first
        self._for_a_person = sys.stdout.isatty()
        self._since: tuple[int, float] = (0, time.monotonic())
        self._start = self._since

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Starts the clock."""
        self._since = self._start = (state.global_step, time.monotonic())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes one record.

        Raises:
            ChatBindError: the loss is not a number any more; on every process, since all see it.
        """
        logs = logs or {}
        if _SUMMARY in logs:
            return
        loss = logs.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise ChatBindError(
                f"the loss is not a number any more at step {state.global_step}",
                hint="try a smaller --learning-rate, a longer --warmup-ratio, or --bf16 instead "
                "of --fp16",
            )
        if self._first:
            self._write(self._record(state, logs))

    def _record(self, state: TrainerState, logs: dict[str, float]) -> Record:
        record: Record = {"step": state.global_step}
        for key in _ORDER:
            if key in logs:
                value = float(logs[key])
                record[key] = float(f"{value:.6g}") if math.isfinite(value) else None
        if "loss" in logs:
            step, then = self._since
            now = time.monotonic()
            self._since = (state.global_step, now)
            n = (state.global_step - step) * self._samples
            record["samples_per_s"] = float(f"{n / max(now - then, 1e-9):.4g}")
            record["steps"] = state.max_steps
            if torch.cuda.is_available():
                peak = torch.cuda.max_memory_allocated() / 2**30
                record["gpu_memory_gib"] = round(peak, 2)
        return record

    def _write(self, record: Record) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(dumps(record) + "\n")
        if self._for_a_person:
            sys.stdout.write(self._line(record) + "\n")
            sys.stdout.flush()
        else:
            emit_record(record)

    def _line(self, record: Record) -> str:
        """The record as a person reads it."""
        if "loss" not in record:
            return f"step {record['step']}  held-out loss {record.get('eval_loss', math.nan):.4f}"
        step, then = self._start
        done = record["step"] - step
        left = (record["steps"] - record["step"]) * (time.monotonic() - then) / max(done, 1)
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        return (
            f"step {record['step']:>{len(str(record['steps']))}}/{record['steps']}"
            f"  loss {record['loss']:.4f}  rate {record.get('learning_rate', 0.0):.2e}"
            f"  {record['samples_per_s']:.4g} samples/s  {hours}:{minutes:02}:{seconds:02} left"
        )

"""What a training run tells: JSON lines for programs, lines for people, a picture of the loss.

A callback of the Trainer; it writes to stdout and to the run's `log.jsonl`, on the first process
only.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chatbind_cli.artifacts import emit_record
from chatbind_cli.errors import ChatBindError
from chatbind_cli.files import replace_file
from chatbind_cli.jsonl import Record, dumps
from chatbind_cli.training.rundir import PICTURE_MARK

# what the Trainer tells once at the end goes into the artefact record instead
_SUMMARY = "train_runtime"
_ORDER = ("loss", "eval_loss", "learning_rate", "grad_norm", "epoch")
# a picture says whose it is, and nothing of when it was made
_METADATA: dict[str, dict[str, str | None]] = {
    "svg": {"Date": None, "Creator": PICTURE_MARK},
    "png": {"Software": PICTURE_MARK},
    "pdf": {"CreationDate": None, "Creator": PICTURE_MARK},
}


class TrainingLog(TrainerCallback):
    """Writes a record every time the Trainer logs.

    Args:
        path: the log file, continued if it is there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._since: tuple[int, float] = (0, time.monotonic())
        self._start = self._since

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
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
        if not math.isfinite(logs.get("loss", 0)):
            raise ChatBindError(
                f"the loss is not a number any more at step {state.global_step}",
                hint="try a smaller --learning-rate, a longer --warmup-ratio, or --bf16 instead "
                "of --fp16",
            )
        if state.is_world_process_zero:
            batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
            self._write(self._record(state, logs, batch * args.world_size))

    def _record(self, state: TrainerState, logs: dict[str, float], batch: int) -> Record:
        record: Record = {"step": state.global_step}
        for key in _ORDER:
            if key in logs:
                value = float(logs[key])
                record[key] = float(f"{value:.6g}") if math.isfinite(value) else None
        if "loss" in logs:
            step, then = self._since
            now = time.monotonic()
            self._since = (state.global_step, now)
            n = (state.global_step - step) * batch
            record["samples_per_s"] = float(f"{n / max(now - then, 1e-9):.4g}")
            record["steps"] = state.max_steps
            if torch.cuda.is_available():
                peak = torch.cuda.max_memory_allocated() / 2**30
                record["gpu_memory_gib"] = round(peak, 2)
        return record

    def _write(self, record: Record) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(dumps(record) + "\n")
        if sys.stdout.isatty():
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
        return (
            f"step {record['step']:>{len(str(record['steps']))}}/{record['steps']}"
            f"  loss {record['loss']:.4f}  rate {record.get('learning_rate', 0.0):.2e}"
            f"  {record['samples_per_s']:.4g} samples/s  {timedelta(seconds=round(left))} left"
        )


def plot_loss(records: Sequence[Record], path: Path, *, title: str) -> None:
    """Draws loss and learning rate over steps; the same records give the same file.

    Args:
        records: log records with `step` and `loss` (and `learning_rate`, `eval_loss`).
        path: the picture; its suffix (.svg, .png, .pdf) says the format.
        title: printed above.
    """
    import matplotlib as mpl  # noqa: PLC0415  half a second, needed once
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    kind = path.suffix.lower().removeprefix(".")
    figure = Figure(figsize=(7, 4))
    figure.subplots_adjust(left=0.1, right=0.88, bottom=0.13, top=0.92)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, label, colour in (("loss", "loss", "C0"), ("eval_loss", "held-out loss", "C2")):
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        if points:
            marker = "o" if len(points) < 3 or key == "eval_loss" else None
            axes.plot(*zip(*points, strict=True), color=colour, label=label, lw=1, marker=marker)
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    rates = [(r["step"], r["learning_rate"]) for r in records if "learning_rate" in r]
    if rates:
        right = axes.twinx()
        right.plot(*zip(*rates, strict=True), color="C1", lw=1, ls="--", label="learning rate")
        right.set_ylabel("learning rate")
        right.set_ylim(bottom=0)
    if axes.lines:
        figure.legend(loc="upper right", bbox_to_anchor=(0.88, 0.9), fontsize="small")
    with mpl.rc_context({"svg.hashsalt": "chatbind"}), replace_file(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=150, metadata=_METADATA[kind])

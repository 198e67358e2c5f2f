"""What a training run tells: JSON lines for programs, lines for people, a picture of the loss.

A callback of the Trainer; it writes on the first process only: records to the run's `log.jsonl` and
to a program that reads stdout, a line for people to stderr.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chatbind_cli import worker
from chatbind_cli.artifacts import emit_record
from chatbind_cli.console import note, quiet
from chatbind_cli.jsonl import Record, dumps
from chatbind_cli.plots import save_plot

# what the Trainer tells once at the end goes into the artefact record instead
_SUMMARY = "train_runtime"
_ORDER = (
    *("loss", "eval_loss", "learning_rate", "grad_norm", "epoch"),
    *("samples_per_s", "tokens_per_s", "mfu", "data_wait", "gpu_memory_gib"),
)
_SECONDS_BETWEEN_LINES = 60.0
_WORTH_TELLING = 0.02  # of the time
_SMOOTHED_FROM = 20  # points


class TrainingLog(TrainerCallback):
    """Writes a record every time the Trainer logs, and tells a person how far it is.

    As a context manager it keeps stdout for the records: trackers print to it.

    Args:
        path: the log file, continued if it is there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = (0, time.monotonic())
        self._told: LiveLine | None = None
        self._stdout = sys.stdout
        self._held = ExitStack()

    def __enter__(self) -> TrainingLog:
        """Puts up the line for people."""
        self._stdout = sys.stdout
        if worker.rank() == 0:
            self._told = LiveLine()
            self._held.callback(self._told.close)
        self._held.enter_context(redirect_stdout(sys.stderr))
        return self

    def __exit__(self, *error: object) -> None:
        """Takes the line away, however training ended."""
        self._held.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock."""
        self._start = (state.global_step, time.monotonic())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Asks for a record of the last step, however far it is from the one before."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes one record."""
        logs = logs or {}
        if _SUMMARY in logs:
            return
        if state.is_world_process_zero:
            record = _record(state, logs)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(dumps(record) + "\n")
            if not self._stdout.isatty():
                emit_record(record, self._stdout)
            if self._told is not None:
                self._told.show(self._line(record))

    def _line(self, record: Record) -> str:
        """The record as a person reads it."""
        if "loss" not in record:
            return f"step {record['step']}, held-out loss {record.get('eval_loss', math.nan):.4f}"
        step, then = self._start
        done = record["step"] - step
        left = (record["steps"] - record["step"]) * (time.monotonic() - then) / max(done, 1)
        words = [
            f"step {record['step']:,}/{record['steps']:,}",
            f"loss {record['loss']:.4f}",
            f"{record['samples_per_s']:,.4g} samples/s",
            f"{record['tokens_per_s']:,.0f} tokens/s",
        ]
        if "mfu" in record:
            words.append(f"MFU {record['mfu']:.1%}")
        if "gpu_memory_gib" in record:
            words.append(f"{record['gpu_memory_gib']:.1f} GiB")
        if record["data_wait"] >= _WORTH_TELLING:
            words.append(f"{record['data_wait']:.0%} of the time waits for data")
        return ", ".join([*words, f"{timedelta(seconds=round(left))} left"])


def _record(state: TrainerState, logs: Mapping[str, float]) -> Record:
    record: Record = {"step": state.global_step}
    for key in (key for key in _ORDER if key in logs):
        value = float(logs[key])
        record[key] = float(f"{value:.6g}") if math.isfinite(value) else None
    if "loss" in logs:
        record["steps"] = state.max_steps
    return record


class LiveLine:
    """One line on stderr: on a terminal always the newest, else one a minute."""

    def __init__(self) -> None:
        self._live: Live | None = None
        self._next = time.monotonic()
        if sys.stderr.isatty() and not quiet():
            # what else is written to the terminal goes above the line
            self._live = Live(
                console=Console(stderr=True), auto_refresh=False, redirect_stdout=False
            )
            self._live.start()

    def show(self, text: str) -> None:
        """Puts a text in the line's place."""
        now = time.monotonic()
        if self._live is not None:
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
        elif now >= self._next:
            self._next = now + _SECONDS_BETWEEN_LINES
            note(text)

    def close(self) -> None:
        """Leaves the last text as an ordinary line."""
        if self._live is not None:
            self._live.stop()


def plot_loss(records: Sequence[Record], path: Path, *, title: str) -> None:
    """Draws loss and learning rate over steps; the same records give the same file.

    Args:
        records: log records with `step` and `loss` (and `learning_rate`, `eval_loss`).
        path: the picture; its suffix (.svg, .png, .pdf) says the format.
        title: printed above.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  half a second, needed once

    figure = Figure(figsize=(7, 4))
    figure.subplots_adjust(left=0.1, right=0.88, bottom=0.13, top=0.92)
    axes = figure.subplots()
    for key, label, colour in (("loss", "loss", "C0"), ("eval_loss", "held-out loss", "C2")):
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) < 3 or key == "eval_loss" else None
        many = key == "loss" and len(points) >= _SMOOTHED_FROM
        raw = {"alpha": 0.35} if many else {"label": label}
        axes.plot(steps, values, color=colour, lw=1, marker=marker, **raw)
        if many:
            axes.plot(steps, smoothed(values), color=colour, lw=1.5, label=f"{label}, smoothed")
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
    save_plot(figure, path, "loss curve")


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a twentieth of the values, without a bias at the start.

    The correction is Adam's (Kingma and Ba, 2015, section 3).
    """
    keep = 1 - 1 / max(1.0, len(values) / 20)
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        means.append(mean / weight)
    return means

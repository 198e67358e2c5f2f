"""What a person reads while a command works: notes and progress, all of it on stderr.

Knows nothing of records: those go to stdout through `artifacts` and `jsonl`.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.progress

_SECONDS_BETWEEN_LINES = 10.0
# Control characters but for tab and line feed, and those that turn the direction of writing.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def quiet() -> bool:
    """Whether notes and progress are off (`--quiet`, or a worker that is not the first)."""
    return (
        os.environ.get("CHATBIND_QUIET", "") not in ("", "0") or os.environ.get("RANK", "0") != "0"
    )


def printable(text: str) -> str:
    """The text without what a terminal would obey: names, errors and answers come from anywhere."""
    return _CONTROL.sub("", text)


def note(text: str) -> None:
    """Writes one line for the person at the terminal or the reader of the log."""
    if not quiet():
        sys.stderr.write(f"chatbind: {printable(' '.join(text.split()))}\n")
        sys.stderr.flush()


def show(text: str) -> None:
    """Writes lines that a person has asked to see; `--quiet` does not keep them back."""
    sys.stderr.write(f"{printable(text)}\n")
    sys.stderr.flush()


class Progress:
    """Counts work done: a bar on a terminal, else a plain line every ten seconds.

    Args:
        total: how many units there will be, or None where that is not known.
        label: what is being done, in the present continuous ("encoding").
        unit: what is counted, in the plural ("files").
    """

    def __init__(self, total: int | None, label: str, unit: str = "items") -> None:
        self.total = total
        self.label = label
        self.unit = unit
        self.n = 0
        self._rest = 0
        self._counting = threading.Lock()
        self._above: Progress | None = None
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES

    def beside(self, total: int | None, label: str) -> Progress:
        """A further count of the same unit while this one goes on: a bar below, or own lines."""
        below = Progress(total, label, self.unit)
        below._above = self
        return below

    def __enter__(self) -> Progress:
        """Starts the bar."""
        if self._above is not None:
            self._bar = self._above._bar
        elif sys.stderr.isatty() and not quiet():
            import rich.console
            import rich.progress as rp

            self._bar = rp.Progress(
                rp.TextColumn("{task.description}"),
                rp.BarColumn(),
                rp.MofNCompleteColumn(),
                rp.TextColumn(self.unit),
                rp.TimeElapsedColumn(),
                rp.TimeRemainingColumn(),
                console=rich.console.Console(stderr=True, soft_wrap=True),
                transient=True,
                # What is printed while the bar is up must go above it, and nowhere else: rich would
                # send what is meant for a file or a pipe to the bar's terminal, too.
                redirect_stdout=sys.stdout.isatty(),
            )
            self._bar.start()
        if self._bar is not None:
            self._task = self._bar.add_task(self.label, total=self.total)
        return self

    def expect_bytes(self, n: int) -> None:
        """Expects `n` more bytes than were known, where the unit is MiB; in any thread."""
        with self._counting:
            self.total = (self.total or 0) + (n >> 20)
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, total=self.total)

    def advance(self, n: int = 1) -> None:
        """Counts `n` more units as done."""
        self.n += n
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=n)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            of_total = f"/{self.total}" if self.total is not None else ""
            note(f"{self.label}: {self.n}{of_total} {self.unit}")

    def advance_bytes(self, n: int) -> None:
        """Counts `n` more bytes, where the unit is MiB; in any thread."""
        with self._counting:
            whole, self._rest = divmod(self._rest + n, 1 << 20)
            if whole:
                self.advance(whole)

    def __exit__(self, *error: object) -> None:
        """Takes the bar away."""
        if self._bar is None:
            return
        if self._above is None:
            self._bar.stop()
        elif self._task is not None:
            self._bar.remove_task(self._task)

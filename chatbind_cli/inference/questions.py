"""Questions: from a file, a pipe or a program, in batches.

From a file, a batch is a window of fixed size on a fixed grid of positions: a run that goes on
after a kill meets the very same batches again, and so the very same arithmetic. From a pipe that
pauses, a batch is closed early, so that nobody waits for an answer because others have not asked
yet. Worker processes have no standard input: a named pipe carries it to them.
"""

from __future__ import annotations

import io
import os
import queue
import stat
import sys
import tempfile
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from chatbind_cli.errors import ChatBindError
from chatbind_cli.files import own_stream
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.jsonl import Line, Record, read_lines
from chatbind_cli.media.medium import Medium

if TYPE_CHECKING:
    from chatbind_cli.data.tokens import TokenizedSample
    from chatbind_cli.model.turns import Turn

IDLE_SECONDS = 0.5
"""How long a pipe may pause before the batch that is being gathered is closed."""

_MOST_COUNTED = 1 << 30
"""Bytes that are read only to tell how long it will take."""

_MOST_AHEAD = 256
"""Records that are read before they are asked for; what bounds the memory of a fast pipe."""


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A question, from its record to its prompt.

    Args:
        text: its words; placeholders such as `<image>` say where media go, else they follow.
        media: what it is about.
        mix: bring all media into one embedding (their weighted sum, at norm 1), which takes the
            place of the first; else each has its own.
        system: what tells the model how to answer, in place of its prompt style's own text.
        earlier: roles and texts of what was said before, with placeholders for its media, which
            are the first of `media`.
        choices: the answers to choose from, where it leaves no others.
        id: its `question_id` (or `id`), if it was a record.
        record: as it was read.
        where: what an error message calls it: file and line of a record.
        line: the number of its line, if that holds no question that goes by an id.
        problem: why it cannot be answered.
        settings: how its answer is generated, where it says that itself.
        turn: what it is in a dialogue, once its media are embedded.
        prompt: what the language model reads, from then on.
        choice_ids: the token ids of each choice behind that.
    """

    text: str = ""
    media: tuple[Medium, ...] = ()
    mix: bool = False
    system: str | None = None
    earlier: tuple[tuple[str, str], ...] = ()
    choices: tuple[str, ...] = ()
    id: str | int | None = None
    record: Record = field(default_factory=dict)
    where: str | None = None
    line: int | None = None
    problem: ChatBindError | None = None
    settings: GenerationSettings | None = None
    turn: Turn | None = None
    prompt: TokenizedSample | None = None
    choice_ids: tuple[list[int], ...] = ()

    @property
    def key(self) -> Hashable:
        """What tells it from the other questions of its file."""
        return self.id if self.line is None else ("line", self.line)


def gather(
    lines: Iterator[Line], size: int, *, idle_seconds: float | None = None
) -> Iterator[list[Line]]:
    """Batches of `size` records; a smaller one is the last, or the last before a pause.

    A batch is closed early, be it empty, when no record comes for `idle_seconds`; the records are
    then read in a thread of their own. None waits for ever.

    Raises:
        Whatever reading the records raises, after the batch before it.
    """
    batch: list[Line] = []
    try:
        for line in lines if idle_seconds is None else _arrivals(lines, idle_seconds):
            if line is not None:
                batch.append(line)
            if line is None or len(batch) == size:
                yield batch
                batch = []
    except (ChatBindError, OSError):
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def open_questions(source: str) -> tuple[Iterator[Line], float | None]:
    """The question records of a file, a named pipe or `-`, and how long `gather` may wait."""
    path = Path(source)
    if source == "-":
        stream = sys.stdin.buffer
        if not _may_pause(stream):
            return read_lines("-", stdin=stream), None
        return read_lines("-", stdin=own_stream(stream)), IDLE_SECONDS
    if path.is_fifo():
        return read_lines("-", stdin=path.open("rb")), IDLE_SECONDS
    return read_lines(path), None


def count_questions(source: str, limit: int | None = None) -> int | None:
    """How many questions are answered, where that is quickly told; for the progress bar."""
    path = Path(source)
    if source == "-" or not path.is_file() or path.stat().st_size > _MOST_COUNTED:
        return None
    with path.open("rb") as file:
        if file.peek(1)[:1] != b"{":
            return None
        count = sum(part.count(b"\n") for part in iter(partial(file.read, 1 << 20), b""))
    return count if limit is None else min(count, limit)


@contextmanager
def piped_stdin(wanted: bool) -> Iterator[Path | None]:
    """Yields a named pipe that carries standard input, or None if it is not wanted."""
    if not wanted:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="chatbind-") as folder:
        path = Path(folder) / "questions.jsonl"
        os.mkfifo(path)
        stdin = own_stream(sys.stdin.buffer)
        # a daemon: if no worker ever opens the pipe, it waits for one for ever
        threading.Thread(target=_pump, args=(stdin, path), daemon=True).start()
        yield path


def _pump(stdin: IO[bytes], path: Path) -> None:
    read: Any = getattr(stdin, "read1", stdin.read)
    # the reader may end before the input does
    with suppress(BrokenPipeError, FileNotFoundError), path.open("wb") as pipe:
        while chunk := read(1 << 16):
            pipe.write(chunk)
            pipe.flush()


def _may_pause(stream: IO[bytes]) -> bool:
    """Whether somebody writes the stream while it is read (a pipe or terminal, not a file)."""
    try:
        return not stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, io.UnsupportedOperation):
        return False


def _arrivals(lines: Iterator[Line], idle_seconds: float) -> Iterator[Line | None]:
    """The lines, and None after each pause longer than `idle_seconds`."""
    arrived: queue.Queue[Line | Exception | None] = queue.Queue(_MOST_AHEAD)

    def read() -> None:
        try:
            for line in lines:
                arrived.put(line)
            arrived.put(None)
        except Exception as error:  # raised again in the thread that reads the queue
            arrived.put(error)

    # a daemon: it may wait for a line that never comes
    threading.Thread(target=read, daemon=True).start()
    patience: float | None = idle_seconds
    while True:
        try:
            line = arrived.get(timeout=patience)
        except queue.Empty:
            patience = None  # a pause is told once
            yield None
            continue
        patience = idle_seconds
        if line is None:
            return
        if isinstance(line, Exception):
            raise line
        yield line

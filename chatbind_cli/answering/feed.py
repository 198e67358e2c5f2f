"""Standard input for worker processes, which have none: a named pipe that this process fills.

Knows nothing of what goes through it.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from chatbind_cli.answering.intake import own_stream

_CHUNK_BYTES = 1 << 16


@contextmanager
def piped_questions(wanted: bool) -> Iterator[Path | None]:
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
    with suppress(BrokenPipeError, FileNotFoundError), path.open("wb", buffering=0) as pipe:
        while chunk := read(_CHUNK_BYTES):
            view = memoryview(chunk)
            while view:
                view = view[pipe.write(view) :]

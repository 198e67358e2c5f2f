"""Runs a program on a real terminal and keeps what it writes there."""

import contextlib
import os
import pty
import subprocess


def on_a_terminal(words, stdout=None):
    """The exit code, and the bytes that came to the terminal.

    stderr is the terminal, and so is stdout unless it has another place.
    """
    mine, theirs = pty.openpty()
    with subprocess.Popen(
        words,
        stdout=theirs if stdout is None else stdout,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    ) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the terminal is gone when the program is
            while block := os.read(mine, 4096):
                shown += block
    os.close(mine)
    return process.returncode, shown

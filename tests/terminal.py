"""Programs on real terminals, and what they write there."""

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time


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


class Terminal:
    """A program on a terminal of its own, as a person has it: keys in, and what is shown out."""

    def __init__(self, words, **options):
        self._mine, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        environment = {
            **os.environ,
            "TERM": "xterm",
            "PROMPT_TOOLKIT_NO_CPR": "1",  # nobody answers here where the cursor is
            "CUDA_VISIBLE_DEVICES": "",
        }
        self.process = subprocess.Popen(
            words,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
            # Ctrl-C comes from the terminal that a session has
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            **options,
        )
        os.close(theirs)
        self._waiting = ""

    def write(self, keys):
        """Types keys."""
        os.write(self._mine, keys.encode())

    def read_until(self, text, seconds=60.0):
        """What is shown until some text, and that; the next call goes on behind it."""
        end = time.monotonic() + seconds
        while text not in self._waiting:
            left = end - time.monotonic()
            if left < 0 or not select.select([self._mine], [], [], left)[0]:
                raise AssertionError(f"{text!r} did not come, but {self._waiting!r}")
            try:
                block = os.read(self._mine, 4096)
            except OSError:
                raise AssertionError(f"ended before {text!r}: {self._waiting!r}") from None
            self._waiting += block.decode(errors="replace")
        shown, _, self._waiting = self._waiting.partition(text)
        return shown + text

    def wait(self):
        """The exit code of the program."""
        return self.process.wait(60)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        os.close(self._mine)
        self.process.kill()
        self.process.wait()

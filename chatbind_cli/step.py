"""Where the tasks that `srun` has started on a machine find each other, to share out work.

Each has CPUs and a GPU of its own, so that one of them cannot start the workers of all: the first
leads, and the others come to it as workers, over a socket that nobody else may open.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from chatbind_cli.errors import LaunchError
from chatbind_cli.meeting import patience_s

_RETRY_S = 0.1
_SOCKET = "leader"


class Door:
    """Where the first task lets the others in.

    Args:
        step: what SLURM calls the launch.

    Attributes:
        socket: can be read when somebody is there.

    Raises:
        LaunchError: the place for it is somebody else's.
    """

    def __init__(self, step: str) -> None:
        self._folder = _folder(step)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        _check_owner(self._folder)
        path = self._folder / _SOCKET
        path.unlink(missing_ok=True)  # of a leader that was killed
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(path))
        self.socket.listen(128)

    def let_in(self) -> Connection:
        """The line to one that has come."""
        return Connection(self.socket.accept()[0].detach())

    def close(self) -> None:
        """Lets nobody in any more."""
        self.socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def line_to_first(step: str) -> Connection:
    """The line from another task to the first one.

    Raises:
        LaunchError: that one does not answer.
    """
    folder = _folder(step)
    seconds = patience_s()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with suppress(FileNotFoundError, ConnectionRefusedError):
            _check_owner(folder)
            line = socket.socket(socket.AF_UNIX)
            line.connect(str(folder / _SOCKET))
            return Connection(line.detach())
        time.sleep(_RETRY_S)
    raise LaunchError(
        f"process 0 of step {step} does not answer at {folder} within {seconds} s",
        hint="does the command run there, and do the tasks share the folder?",
    )


def _folder(step: str) -> Path:
    return Path(tempfile.gettempdir()) / f"chatbind-{os.getuid()}-{step}"


def _check_owner(folder: Path) -> None:
    """Objects of Python are read from the socket, and so it has to be the user's own.

    Raises:
        LaunchError: others may open it.
        FileNotFoundError: it is not there yet.
    """
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o77 or not folder.is_dir():
        raise LaunchError("is not this user's alone", where=str(folder))

"""How a training run is told to stop: by a signal, or by a file that its parent leaves.

Schedulers and terminals signal a parent, its workers, or every process at once. Whoever hears of it
notes it, the workers agree at the end of a step, and end together with a checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

from chatbind_cli.console import quiet
from chatbind_cli.worker import STATUS_FOLDER

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# in the status folder
_LISTENING, _STOP, _PRESSED = "listening", "stop", "pressed"

_noted = _pressed = False


def requested() -> bool:
    """Whether this process was told to stop, by a signal or by its parent."""
    folder = os.environ.get(STATUS_FOLDER)
    return _noted or (folder is not None and (Path(folder) / _STOP).exists())


@contextmanager
def noting(*numbers: signal.Signals) -> Iterator[None]:
    """Has signals noted, for `requested`, in place of what they do to a process.

    A second Ctrl-C ends a process that stands alone. A worker it does not: launchers pass on what
    the worker has had already, and its parent ends it where need be.
    """
    global _noted, _pressed
    own = os.getpid()

    def note_it(number: int, frame: FrameType | None) -> None:
        global _noted, _pressed
        if os.getpid() != own:
            return
        if number == signal.SIGINT and "RANK" not in os.environ:
            if _pressed:
                raise KeyboardInterrupt
            _pressed = True
        if not _noted and number != signal.SIGUSR1:
            _say_so()
        _noted = True

    # a shell's background job is not to hear Ctrl-C
    heard = [n for n in numbers if n != signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, note_it) for number in heard}
    try:
        yield
    finally:
        _noted = _pressed = False
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def listening() -> Iterator[None]:
    """Training asks at the end of each step from here on; its parent, if it has one, may know."""
    folder = os.environ.get(STATUS_FOLDER)
    if folder is not None and Path(folder).is_dir():
        (Path(folder) / _LISTENING).touch()
    with noting(*SIGNALS):
        yield


def ask(folder: Path, *, pressed: bool = False) -> bool:
    """Asks the workers of a status folder to stop at the end of their step.

    Args:
        folder: of the workers.
        pressed: whether it was Ctrl-C, which a person presses again who cannot wait.

    Returns:
        Whether they will; if not, they have to be ended.
    """
    if not (folder / _LISTENING).exists() or (pressed and (folder / _PRESSED).exists()):
        return False
    if not (folder / _STOP).exists():
        _say_so()
    (folder / _STOP).touch()
    if pressed:
        (folder / _PRESSED).touch()
    return True


def pass_on(folder: Path) -> None:
    """Leaves word for workers of what was noted here, also where they do not listen yet."""
    if _noted:
        (folder / _STOP).touch()


def _say_so() -> None:
    """Tells a person that the signal was heard; from a handler, and so past Python's buffers."""
    if not quiet():
        text = "chatbind: stopping after this step, with a checkpoint; Ctrl-C again: at once\n"
        os.write(2, text.encode())


@contextmanager
def unheard(*numbers: signal.Signals) -> Iterator[None]:
    """Holds signals back, here for a while, and from processes that are started meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent(number: int) -> None:
    """In a data loader's process: leaves the signals to the trainer, which still needs batches.

    The trainer itself ends its loaders with SIGTERM.

    Args:
        number: of the process, as loaders tell it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = os.getppid()
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)

"""What a process that was launched knows of itself, and how its parent hears how it ended.

Launchers flatten a worker's exit code to 1 and mix the workers' output; so each worker leaves its
outcome in a file of the status folder, which `launch` turns into the parent's own exit code.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from chatbind_cli import slurm
from chatbind_cli.hardware import cpu_count

STATUS_FOLDER = "CHATBIND_STATUS_FOLDER"
LINE = "CHATBIND_LINE"
"""The file descriptor by which a worker of a `worker_pool` talks with its leader."""
_ALIVE = "alive"
_POLL_S = 0.2


def is_worker() -> bool:
    """Whether this process was started by another of the same command."""
    return has_parent() or LINE in os.environ


def has_parent() -> bool:
    """Whether this process was started by `dispatch`, and so has a parent to report to."""
    return STATUS_FOLDER in os.environ


def temporary_folder() -> TemporaryDirectory[str]:
    """A folder that goes with this process, or with the parent that ends it."""
    return TemporaryDirectory(prefix="chatbind-", dir=os.environ.get(STATUS_FOLDER))


def rank() -> int:
    """This process's number among all workers, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of workers over all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def cpus() -> int:
    """The CPUs that fall to this worker, among those of its machine; at least one."""
    task, seen = slurm.task(), cpu_count()
    if task is not None and not task.one_a_machine:
        return task.cpus(seen)
    return max(1, seen // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextmanager
def alive(folder: Path) -> Iterator[None]:
    """Holds the lock that the workers' `watch_parent` waits for."""
    from filelock import lock_descriptor

    with (folder / _ALIVE).open("w") as file:
        try:
            lock_descriptor(file.fileno())
        except OSError:
            # a file system without locks: there is nothing to watch
            (folder / _ALIVE).unlink()
        yield


def remove_status(folder: Path) -> None:
    """Takes a status folder away, from under workers that may still be writing into it."""
    with suppress(FileNotFoundError):  # somebody else has
        shutil.rmtree(folder.rename(f"{folder}.gone"), ignore_errors=True)


def report_outcome(code: int, message: str, *, killed: bool = False) -> None:
    """Leaves this worker's exit code and message, and whether a signal ended it, for the parent."""
    folder = Path(os.environ[STATUS_FOLDER])
    if folder.is_dir():
        outcome = {"rank": rank(), "exit_code": code, "message": message, "killed": killed}
        leave_outcome(folder, {**outcome, "host": slurm.host(), "time_s": time.time()})


def leave_outcome(folder: Path, outcome: Mapping[str, Any]) -> None:
    """Puts a worker's outcome into the status folder, whole or not at all."""
    unseen = folder / f"{outcome['rank']}.{os.getpid()}.tmp"
    unseen.write_text(json.dumps(outcome), encoding="utf-8")
    unseen.replace(folder / f"rank-{outcome['rank']:05}.json")


def work_in_child() -> None:
    """Goes on in a child process, while this one waits to say of which signal the child died.

    Only a parent is told, and the worker's parent is the launcher, which makes forty lines of it.
    """
    # the launcher hears none of them
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
    reading, writing = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(writing)
        threading.Thread(target=_end_with_watcher, args=(reading,), daemon=True).start()
        return
    os.close(reading)
    told = False

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        with suppress(ProcessLookupError):
            os.kill(worker, number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, pass_on)
    _, status = os.waitpid(worker, 0)
    if os.WIFSIGNALED(status) and not told:
        report_killed(os.WTERMSIG(status))
    os._exit(0)


def _end_with_watcher(pipe: int) -> None:
    """Ends this worker when the process that waits for it is gone: no other signal ends that."""
    os.read(pipe, 1)
    report_killed(signal.SIGKILL)
    os._exit(0)


def report_killed(number: int) -> None:
    """Leaves word of the signal that ended this worker."""
    report_outcome(1, killed_text(rank(), number), killed=True)


def killed_text(rank: int, number: int) -> str:
    """How a message names a worker of this machine, and the signal that ended it."""
    text = f"lost process {rank} on {slurm.host()}: "
    text += f"killed by signal {number:d} ({signal.Signals(number).name})"
    if number == signal.SIGKILL:
        text += "; where memory runs out the system does that (see `dmesg`): take smaller batches "
        text += "or fewer processes"
    return text


def watch_parent() -> None:
    """Ends this worker, without ado, when the process that dispatched it is no more.

    The launcher stands between the two and would go on by itself; but the parent holds a lock
    that the system takes back when it dies, however it dies.
    """
    folder = Path(os.environ[STATUS_FOLDER])
    if not folder.is_dir():
        # another worker has found the parent dead, and tidied up
        os._exit(0)
    with suppress(OSError):
        handle = os.open(folder / _ALIVE, os.O_RDONLY)
        threading.Thread(target=_outlive, args=(handle, folder), daemon=True).start()


def _outlive(handle: int, folder: Path) -> None:
    from filelock import lock_descriptor

    with suppress(OSError):
        lock_descriptor(handle, poll_interval=_POLL_S)
        remove_status(folder)
        # nobody is there to be told, and the launcher says less about a worker that ends with 0
        os._exit(0)

"""The processes that share out the work of one command, started by the one that leads them.

A worker is the same command once more, with a line to the leader: one end of a pair of sockets
that nobody else has. Whoever dies, however, the system closes its end. So a worker ends with its
leader at once, and the leader hears which worker is gone, and goes on with the others.

The tasks that `srun` has started on a machine have CPUs and a GPU of their own each, so that one of
them cannot start the workers of all: the first leads, and the others come to it as workers, over a
socket that nobody else may open.
"""

from __future__ import annotations

import os
import pickle
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from chatbind_cli import sbatch, slurm, worker
from chatbind_cli.errors import LaunchError, UsageError
from chatbind_cli.hardware import cpu_count
from chatbind_cli.meeting import patience_s
from chatbind_cli.plan import Dispatch

_PATIENCE_S = 5.0
"""How long a worker whose line has ended may take to die, of whatever it dies."""
_TIDYING_S = 1.0
"""How long a worker that is not needed may take to leave nothing behind."""
_RETRY_S = 0.1
_SOCKET = "leader"


@dataclass(frozen=True)
class WorkerPool:
    """Who works.

    Attributes:
        size: how many workers; one: this process itself, unless it is somebody's worker.
        line: what starts one.
        follows: this process is a worker.
        door: where all workers but the first come from; else all are started.
    """

    size: int = 1
    line: tuple[str, ...] = ()
    follows: bool = False
    door: Door | None = None


def pool_of(args: Sequence[str], plan: Dispatch, extra: Sequence[str] = ()) -> WorkerPool | None:
    """Who does the work of `chatbind ARGS`, all of it on this machine.

    Under somebody's launcher (`torchrun`, `accelerate launch`) the first process leads workers of
    its own, as many as were launched, and the others have nothing to do: a launcher ends all of
    its processes where one dies. Of several tasks of `srun` the others come to the first.

    Args:
        args: the command and its words, as the user wrote them.
        plan: on what to run.
        extra: words put at the end, where they win: what this process has read from its standard
            input, since workers get none.

    Returns:
        None: there is nothing to do here, or the dry run is printed.

    Raises:
        UsageError: several machines were asked for.
        LaunchError: the first task of `srun` does not answer.
    """
    if worker.LINE in os.environ:
        return WorkerPool(follows=True)
    if worker.is_worker():
        return WorkerPool()
    plan = plan.with_slurm()
    size = worker.world_size() if "RANK" in os.environ else plan.wanted_processes
    _check_place(plan)
    words = [word for word in (*args, *extra) if word != "--dry-run"]
    if plan.sbatch:
        sys.stdout.write(sbatch.script(words, plan))
        return None
    if size > 1 and plan.num_processes is None:
        words += ["--num-processes", str(size)]
    line = (sys.executable, "-m", "chatbind_cli", *words)
    if plan.dry_run:
        sys.stdout.write(shlex.join(line) + "\n")
        return None
    if plan.task is not None and "RANK" not in os.environ:
        return _of_step(plan, plan.task, line)
    return WorkerPool(size, line) if worker.rank() == 0 else None


def _of_step(plan: Dispatch, task: slurm.Task, line: tuple[str, ...]) -> WorkerPool:
    os.environ.update({**plan.variables(), **plan.preferences()})
    if task.rank == 0:
        return WorkerPool(task.tasks, line, door=Door(task.step))
    to_first = line_to_first(task.step)
    say(to_first, task.rank)
    os.environ[worker.LINE] = str(os.dup(to_first.fileno()))
    to_first.close()
    return WorkerPool(follows=True)


def _check_place(plan: Dispatch) -> None:
    """Refuses several machines."""
    local = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    hosts = len(plan.task.hosts) if plan.task else plan.machines
    if hosts > 1 or int(local) != worker.world_size():
        raise UsageError(
            "this command works on one machine",
            hint="give each its share of the inputs with --shard, and an --output of its own",
        )


class WorkerProcess:
    """A worker, as its leader knows it.

    Args:
        rank: its number.
        line: to it.
        process: it, where it was started here.

    Attributes:
        room: for how many items; 0 until it is ready.
        held: what it has, by number.
    """

    def __init__(
        self, rank: int, line: Connection, process: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.rank, self.line, self.process = rank, line, process
        self.room = 0
        self.held: dict[int, Any] = {}

    @classmethod
    def started(cls, pool: WorkerPool, rank: int) -> WorkerProcess:
        """Starts one."""
        ours, theirs = Pipe()
        with theirs:
            # a session of its own: a terminal's Ctrl-C is for the leader
            process = subprocess.Popen(
                pool.line,
                env=_environment(pool, rank, theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=2,  # records are the leader's
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        return cls(rank, ours, process)

    @classmethod
    def come(cls, door: Door) -> WorkerProcess:
        """One that stands at the door.

        Raises:
            EOFError, OSError: it is gone again.
        """
        line = door.let_in()
        return cls(hear(line), line)

    def give(self, number: int, item: Any) -> None:
        """Sends it an item; that it is gone shows when listening."""
        self.held[number] = item
        with suppress(OSError):
            say(self.line, (number, item))

    def end(self) -> str:
        """Ends it, and says how it ended."""
        self.line.close()
        lost = f"lost process {self.rank} on {slurm.host()}: "
        if self.process is None:
            return lost + "its connection has ended"
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_PATIENCE_S)
        self.kill()
        code = self.process.returncode
        if code < 0:
            return worker.killed_text(self.rank, -code)
        return lost + f"it has ended with exit code {code}"

    def kill(self) -> None:
        """Ends it, whatever it is at; one that came ends itself without its line."""
        self.line.close()
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_TIDYING_S)
            self.process.kill()
            self.process.wait()


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


def _environment(pool: WorkerPool, rank: int, line: int) -> dict[str, str]:
    values = {**os.environ, worker.LINE: str(line)}
    values |= {"RANK": str(rank), "WORLD_SIZE": str(pool.size)}
    values |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(pool.size)}
    values.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count() // pool.size)))
    return values


def line_to_leader() -> Connection:
    """The line of this worker, which no process that it starts is to have."""
    handle = int(os.environ[worker.LINE])
    os.set_inheritable(handle, False)
    return Connection(handle)


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


def say(line: Connection, word: Any) -> None:
    """Sends a Python object whole: a tensor with its numbers, and not as a place in memory."""
    line.send_bytes(pickle.dumps(word))


def hear(line: Connection) -> Any:
    """The next object; only processes of one command are at the ends of a line.

    Raises:
        EOFError, OSError: the other side is gone.
    """
    return pickle.loads(line.recv_bytes())  # noqa: S301

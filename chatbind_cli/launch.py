"""Runs a command in place, or in workers: as `accelerate launch`, or as one task of `srun`.

The launched workers are the very same command: what `--dry-run` prints can be typed by hand. How
they end is read from what each leaves in the status folder, see `worker`; the parents on several
machines tell it each other, see `meeting`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import click

from chatbind_cli import sbatch, slurm, stopping
from chatbind_cli.errors import (
    ChatBindError,
    Interrupted,
    LaunchError,
    SomeRecordsFailed,
    Terminated,
)
from chatbind_cli.launch_config import config_words
from chatbind_cli.meeting import Meeting, meet
from chatbind_cli.plan import Dispatch
from chatbind_cli.worker import STATUS_FOLDER, alive, is_worker, leave_outcome, remove_status

_POLL_S = 0.2
_GRACE_S = 1.0
"""How long workers may still say why they failed when the first one has failed."""


def dispatch(
    args: Sequence[str],
    plan: Dispatch,
    extra: Sequence[str] = (),
    meanwhile: Callable[[Path], None] | None = None,
) -> bool:
    """Runs `chatbind ARGS` in worker processes where the plan wants that.

    Args:
        args: the command and its words, as the user wrote them.
        plan: on what to run.
        extra: words put at the end, where they win: what the parent has read from its standard
            input ("--projector", "/path"), since workers get none.
        meanwhile: what this process does while the workers start, with their status folder; where
            it fails, they are ended.

    Returns:
        True: done, or the dry run is printed. False: the caller goes on in this process.

    Raises:
        LaunchError: the workers could not be started, or died without leaving a word.
        ChatBindError: a worker failed; the same message and exit code.
        UsageError: several machines, and no address to meet at.
    """
    if _is_launched():
        return False
    if plan.sbatch:
        sys.stdout.write(sbatch.script([*args, *extra], plan))
        return True
    with met(plan) as here:
        launched, environment, line = _needs_workers(here), {}, [sys.executable]
        if launched:
            line, environment = _launcher(here), here.variables()
        line += _worker_command(args, extra)
        if here.dry_run:
            prefix = [f"{name}={value}" for name, value in environment.items()]
            sys.stdout.write(shlex.join([*prefix, *line]) + "\n")
        elif launched:
            variables = {**environment, **here.preferences()}
            _run_workers(line, variables, here.meeting, meanwhile)
        return launched or here.dry_run


@contextmanager
def met(plan: Dispatch) -> Iterator[Dispatch]:
    """Waits for the other machines, or tasks, of a launch, and ends with them.

    To be entered before heavy work, so that a machine that is missing shows at once. What goes
    wrong inside is told to the others.

    Args:
        plan: on what to run.

    Yields:
        the plan with SLURM's variables, and with the meeting where there is one.

    Raises:
        LaunchError: somebody did not come.
    """
    if _is_launched():
        yield plan
        return
    plan = plan.with_slurm()
    me = None if plan.dry_run or plan.meeting is not None else plan.member()
    if me is None:
        yield plan
        return
    under_slurm = me.step != ""
    if under_slurm and me.rank != 0:
        os.environ["CHATBIND_QUIET"] = "1"  # all write to one file
    host, port = plan.address()
    meeting = meet(me, host, port, plan.hosts)
    try:
        yield replace(plan, meeting=meeting)
    except BaseException as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        text = f"chatbind: error: {error}"
        word = {"rank": me.first, "exit_code": code, "message": text, "host": me.host}
        meeting.leave({**word, "time_s": time.time()})
        if under_slurm and meeting.first_knows and isinstance(error, ChatBindError):
            raise click.exceptions.Exit(code) from error
        raise
    meeting.leave()


def run_apart(args: Sequence[str], *, folder: Path, environment: Mapping[str, str]) -> None:
    """Runs `chatbind ARGS` in a process that ends with this one; its records go nowhere.

    Args:
        args: the command and its words.
        folder: where it works.
        environment: variables besides those of this process.

    Raises:
        ChatBindError: it failed; the same message and exit code.
    """
    line = [sys.executable, *_worker_command(args, ())]
    _run_workers(line, environment, cwd=folder, stdout=subprocess.DEVNULL)


def _needs_workers(plan: Dispatch) -> bool:
    several = plan.wanted_processes > 1 or plan.machines > 1
    return several or plan.launch_config is not None or plan.uses_gpu


def _is_launched() -> bool:
    """Whether this process is a worker, of ours or of a launcher that somebody typed."""
    return is_worker() or "RANK" in os.environ or "LOCAL_RANK" in os.environ


def _worker_command(args: Sequence[str], extra: Sequence[str]) -> list[str]:
    return ["-m", "chatbind_cli", *args, *extra]


def _launcher(plan: Dispatch) -> list[str]:
    if plan.task is not None:
        return [sys.executable]
    if importlib.util.find_spec("accelerate") is None:
        raise LaunchError("accelerate is not installed", hint="pip install accelerate")
    line = [sys.executable, "-m", "accelerate.commands.launch"]
    line += config_words(plan.launch_config)
    n = plan.workers_here * plan.machines
    if plan.launch_config is not None:
        if plan.num_processes is not None:
            line += ["--num_processes", str(n)]
    else:
        # `--multi_gpu` is the launcher's word for torch's elastic agent; with
        # ACCELERATE_USE_CPU in the environment its workers meet over gloo on CPUs.
        line += ["--multi_gpu"] if n > 1 else []
        line += ["--num_processes", str(n)]
        line += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    if plan.machines > 1:
        host, port = plan.address()
        line += ["--num_machines", str(plan.machines)]
        line += ["--machine_rank", str(plan.machine_rank or 0)]
        line += ["--main_process_ip", host, "--main_process_port", str(port)]
    elif plan.launch_config is None:
        line += ["--num_machines", "1", "--main_process_port", "0"]
    return line


def _run_workers(
    line: Sequence[str],
    environment: Mapping[str, str],
    meeting: Meeting | None = None,
    meanwhile: Callable[[Path], None] | None = None,
    **place: Any,
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="chatbind-"))
    variables = {**os.environ, **environment, STATUS_FOLDER: str(folder)}
    with alive(folder):
        try:
            code = _supervise(line, variables, folder, meeting, meanwhile, **place)
            _raise_outcome(folder, code)
        finally:
            remove_status(folder)  # before workers that are left may think that nobody does


def _supervise(
    line: Sequence[str],
    variables: Mapping[str, str],
    folder: Path,
    meeting: Meeting | None = None,
    meanwhile: Callable[[Path], None] | None = None,
    **place: Any,
) -> int:
    """Runs the launcher; whatever ends this process or a worker ends all of them.

    The launcher is not left to find out by itself that a worker failed or Ctrl-C was pressed: it
    would say so in forty lines. So workers end with 0, whatever they have reported, and signals
    of the terminal do not reach the launcher's session.
    """
    before = _stop_workers(folder)
    process = None
    try:
        with stopping.unheard(*stopping.SIGNALS):  # the launcher need not know
            process = subprocess.Popen(
                line, env=variables, stdin=subprocess.DEVNULL, start_new_session=True, **place
            )
        if meanwhile is not None:
            meanwhile(folder)
        while not _failures(folder, meeting) and process.poll() is None:
            stopping.pass_on(folder)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)
        until = time.monotonic() + _GRACE_S
        while _failures(folder, meeting) and time.monotonic() < until:
            if meeting is None and process.poll() is not None:
                break
            time.sleep(_POLL_S)
        return process.returncode or 0
    finally:
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_workers(folder: Path) -> dict[int, Any]:
    """Has signals stop workers, at the end of a step where they train; returns the handlers before.

    The handlers raise `Terminated` or KeyboardInterrupt where that cannot be waited for.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        pressed = number == signal.SIGINT
        if not stopping.ask(folder, pressed=pressed):
            raise KeyboardInterrupt if pressed else Terminated("was sent SIGTERM")

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as a shell's background jobs have it
        numbers.append(signal.SIGINT)
    return {number: signal.signal(number, stop) for number in numbers}


_FINISHED = (0, SomeRecordsFailed.exit_code)


def _outcomes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("rank-*.json"))]


def _failures(folder: Path, meeting: Meeting | None) -> list[dict[str, Any]]:
    """What failed workers have said, here and on other machines."""
    failures = [o for o in _outcomes(folder) if o["exit_code"] not in _FINISHED]
    for told in meeting.exchange(failures) if meeting else ():
        leave_outcome(folder, told)
        failures.append(told)
    return failures


def _raise_outcome(folder: Path, launcher_code: int) -> None:
    failed = [outcome for outcome in _outcomes(folder) if outcome["exit_code"] != 0]
    if failed:
        cause = min(failed, key=_distance_from_cause)
        raise WorkerFailed(cause["exit_code"], cause["message"], cause.get("host"))
    if launcher_code != 0:
        raise LaunchError(
            f"the launcher ended with exit code {launcher_code}, and no worker said why",
            hint="see the lines above; a worker that was killed may have run out of memory",
        )


def _distance_from_cause(outcome: Mapping[str, Any]) -> tuple[bool, bool, bool, float]:
    """Orders what workers say: one that was told to stop, or has lost another, knows less."""
    told_to_stop = outcome["exit_code"] in (130, 143, Interrupted.exit_code)
    internal = "internal error" in outcome["message"]  # as when a connection is lost
    time_s = float(outcome.get("time_s", 0))
    return told_to_stop, not outcome.get("killed"), internal, time_s


class WorkerFailed(ChatBindError):
    """What a worker said when it failed, with its exit code."""

    def __init__(self, exit_code: int, message: str, host: str | None = None) -> None:
        words = message.removeprefix("chatbind: ").removeprefix("error: ") or "a worker failed"
        elsewhere = host not in (None, slurm.host()) and exit_code != Interrupted.exit_code
        # what was lost, and where, is said already
        super().__init__(f"{host}: {words}" if elsewhere and f" on {host}" not in words else words)
        self.exit_code = exit_code

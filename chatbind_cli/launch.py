"""Runs a command in place, or as `accelerate launch` on several processes and machines.

The launched workers are the very same command: what `--dry-run` prints can be typed by hand. How
they end is read from what each leaves in the status folder, see `worker`.
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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from chatbind_cli import stopping
from chatbind_cli.errors import (
    ChatBindError,
    Interrupted,
    LaunchError,
    SomeRecordsFailed,
    UsageError,
)
from chatbind_cli.launch_config import config_words
from chatbind_cli.numerals import whole_number
from chatbind_cli.worker import STATUS_FOLDER, alive, is_worker

_DEFAULT_PORT = "29500"
_POLL_S = 0.2
_GRACE_S = 1.0
"""How long workers may still say why they failed when the first one has failed."""


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """On how many processes and machines a command runs; None: SLURM's or the machine's own."""

    num_processes: int | None = None
    num_machines: int | None = None
    machine_rank: int | None = None
    main_address: str | None = None
    launch_config: Path | None = None
    device: str = "auto"
    dry_run: bool = False

    def with_slurm(self) -> Dispatch:
        """Fills what is None from the variables of a SLURM job step."""
        machines = self.num_machines or whole_number(os.environ.get("SLURM_NNODES", ""))
        rank = self.machine_rank
        if rank is None:
            rank = whole_number(os.environ.get("SLURM_NODEID", ""))
        address = self.main_address
        if address is None and machines and machines > 1:
            hosts = os.environ.get("SLURM_JOB_NODELIST") or os.environ.get("SLURM_NODELIST")
            address = first_slurm_host(hosts) if hosts else None
        return replace(self, num_machines=machines, machine_rank=rank, main_address=address)


def dispatch(args: Sequence[str], plan: Dispatch, extra: Sequence[str] = ()) -> bool:
    """Runs `chatbind ARGS` in worker processes where the plan wants that.

    Args:
        args: the command and its words, as the user wrote them.
        plan: on what to run.
        extra: words put at the end, where they win: what the parent has read from its standard
            input ("--projector", "/path"), since workers get none.

    Returns:
        True: done, or the dry run is printed. False: the caller goes on in this process.

    Raises:
        LaunchError: the workers could not be started, or died without leaving a word.
        ChatBindError: a worker failed; the same message and exit code.
        UsageError: several machines, and no address to meet at.
    """
    if _is_launched():
        return False
    plan = plan.with_slurm()
    launched, environment, line = needs_workers(plan), {}, [sys.executable]
    if launched:
        line = _launcher(plan, _wanted_processes(plan))
        environment = {} if _uses_gpu(plan) else {"ACCELERATE_USE_CPU": "true"}
    line += _worker_command(args, extra)
    if plan.dry_run:
        prefix = [f"{name}={value}" for name, value in environment.items()]
        sys.stdout.write(shlex.join([*prefix, *line]) + "\n")
    elif launched:
        _run_workers(line, environment)
    return launched or plan.dry_run


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


def needs_workers(plan: Dispatch) -> bool:
    """Whether `dispatch` would start worker processes: they have no standard input to read."""
    if _is_launched():
        return False
    plan = plan.with_slurm()
    several = _wanted_processes(plan) > 1 or (plan.num_machines or 1) > 1
    return several or plan.launch_config is not None or _uses_gpu(plan)


def _is_launched() -> bool:
    """Whether this process is a worker, of ours or of a launcher that somebody typed."""
    return is_worker() or "RANK" in os.environ or "LOCAL_RANK" in os.environ


def first_slurm_host(hosts: str) -> str:
    """The first host of SLURM's compressed list: `node[03-05,9],x1` -> `node03`."""
    head, bracket, rest = hosts.partition("[")
    if not bracket or "," in head:
        return hosts.split(",")[0]
    return head + rest.split("]")[0].split(",")[0].split("-")[0]


def _worker_command(args: Sequence[str], extra: Sequence[str]) -> list[str]:
    return ["-m", "chatbind_cli", *args, *extra]


def _uses_gpu(plan: Dispatch) -> bool:
    if plan.device == "cpu":
        return False
    return plan.device.startswith("cuda") or gpu_count() > 0


def gpu_count() -> int:
    """The number of NVIDIA GPUs, counted without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def _wanted_processes(plan: Dispatch) -> int:
    if plan.num_processes is not None:
        return plan.num_processes
    gpus = gpu_count() if plan.device in ("auto", "cuda") else 0
    return (plan.num_machines or 1) * max(1, gpus)


def _launcher(plan: Dispatch, n: int) -> list[str]:
    if importlib.util.find_spec("accelerate") is None:
        raise LaunchError("accelerate is not installed", hint="pip install accelerate")
    line = [sys.executable, "-m", "accelerate.commands.launch"]
    line += config_words(plan.launch_config)
    if plan.launch_config is not None:
        if plan.num_processes is not None:
            line += ["--num_processes", str(n)]
    else:
        machines = plan.num_machines or 1
        # `--multi_gpu` is the launcher's word for torch's elastic agent; with
        # ACCELERATE_USE_CPU in the environment its workers meet over gloo on CPUs.
        line += ["--multi_gpu"] if n > 1 else []
        line += ["--num_processes", str(n), "--num_machines", str(machines)]
        line += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return line + _meeting_point(plan)


def _meeting_point(plan: Dispatch) -> list[str]:
    if (plan.num_machines or 1) == 1:
        return ["--main_process_port", "0"] if plan.launch_config is None else []
    if plan.main_address is None:
        raise UsageError(
            "several machines need --main-address HOST:PORT",
            hint="name machine 0 and a free port of it",
        )
    host, _, port = plan.main_address.partition(":")
    line = ["--machine_rank", str(plan.machine_rank or 0), "--main_process_ip", host]
    return [*line, "--main_process_port", port or _DEFAULT_PORT]


def _run_workers(line: Sequence[str], environment: Mapping[str, str], **place: Any) -> None:
    try:
        with tempfile.TemporaryDirectory(prefix="chatbind-") as name:
            folder = Path(name)
            variables = {**os.environ, **environment, STATUS_FOLDER: name}
            # One thread a worker unless the user says otherwise: the launcher's own default, set
            # here because its warning about it would be noise.
            variables.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))
            with alive(folder):
                code = _supervise(line, variables, folder, **place)
                _raise_outcome(folder, code)
    except _Terminated:
        # the workers are gone, the folder too: now die of the signal, as the sender expects
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)


class _Terminated(BaseException):
    """This process was sent SIGTERM."""


def _supervise(
    line: Sequence[str], variables: Mapping[str, str], folder: Path, **place: Any
) -> int:
    """Runs the launcher; whatever ends this process or a worker ends all of them.

    The launcher is not left to find out by itself that a worker failed or Ctrl-C was pressed: it
    would say so in forty lines. So workers end with 0, whatever they have reported, and signals
    of the terminal do not reach the launcher's session.
    """
    before = _stop_workers(folder)
    with stopping.unheard(*stopping.SIGNALS):  # the launcher need not know
        process = subprocess.Popen(
            line, env=variables, stdin=subprocess.DEVNULL, start_new_session=True, **place
        )
    try:
        while process.poll() is None:
            stopping.pass_on(folder)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)
            if any(o["exit_code"] not in _FINISHED for o in _outcomes(folder)):
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE_S)
                break
        return process.returncode or 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_workers(folder: Path) -> dict[int, Any]:
    """Has signals stop workers, at the end of a step where they train; returns the handlers before.

    The handlers raise `_Terminated` or KeyboardInterrupt where that cannot be waited for.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        pressed = number == signal.SIGINT
        if not stopping.ask(folder, pressed=pressed):
            raise KeyboardInterrupt if pressed else _Terminated

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as a shell's background jobs have it
        numbers.append(signal.SIGINT)
    return {number: signal.signal(number, stop) for number in numbers}


_FINISHED = (0, SomeRecordsFailed.exit_code)


def _outcomes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("rank-*.json"))]


def _raise_outcome(folder: Path, launcher_code: int) -> None:
    failed = [outcome for outcome in _outcomes(folder) if outcome["exit_code"] != 0]
    if failed:
        cause = min(failed, key=_distance_from_cause)
        raise WorkerFailed(cause["exit_code"], cause["message"])
    if launcher_code != 0:
        raise LaunchError(
            f"the launcher ended with exit code {launcher_code}, and no worker said why",
            hint="see the lines above; a worker that was killed may have run out of memory",
        )


def _distance_from_cause(outcome: Mapping[str, Any]) -> tuple[bool, bool, float]:
    """Orders what workers say: one that was told to stop, or has lost another, knows less."""
    told_to_stop = outcome["exit_code"] in (130, 143, Interrupted.exit_code)
    return told_to_stop, not outcome.get("killed"), float(outcome.get("time_s", 0))


class WorkerFailed(ChatBindError):
    """What a worker said when it failed, with its exit code."""

    def __init__(self, exit_code: int, message: str) -> None:
        words = message.removeprefix("chatbind: ").removeprefix("error: ")
        super().__init__(words or "a worker failed")
        self.exit_code = exit_code

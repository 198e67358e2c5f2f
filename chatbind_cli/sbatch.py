"""The batch script of a command, for SLURM's `sbatch`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from chatbind_cli.errors import Interrupted, UsageError
from chatbind_cli.hardware import gpu_count
from chatbind_cli.plan import Dispatch

_TEMPLATE = Path(__file__).with_suffix(".sh")


def script(args: Sequence[str], plan: Dispatch) -> str:
    """A script that runs `chatbind ARGS` on machines of a cluster.

    Args:
        args: the command and its words, `--sbatch` among them.
        plan: how many machines, and GPUs.

    Raises:
        UsageError: nothing tells how many GPUs, or the command would begin anew each time.
    """
    words = [word for word in args if word != "--sbatch"]
    if "--overwrite" in words:
        raise UsageError(
            "--sbatch does not go with --overwrite",
            hint="a job that is put back into the queue is to go on; take a new --output",
        )
    if plan.device != "cpu" and plan.num_processes is None and gpu_count() == 0:
        raise UsageError("--sbatch needs --num-processes", hint="the GPUs of all machines together")
    text = _TEMPLATE.read_text(encoding="utf-8")
    if plan.device == "cpu":
        text = "".join(line for line in text.splitlines(keepends=True) if "GPUS" not in line)
    for name, value in {
        "GPUS": str(plan.workers_here),
        "MACHINES": str(plan.machines),
        "STOPPED": str(Interrupted.exit_code),
        "COMMAND": shlex.join([sys.executable, "-m", "chatbind_cli", *words]),
    }.items():
        text = text.replace(name, value)
    return text

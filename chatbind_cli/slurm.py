"""What SLURM tells a process of itself: which task of which step it is, and on what machines.

Only tasks of `srun` are of a step. The script of `sbatch` sees the job's variables, too, but runs
once: nobody else would come to a meeting that it waits for.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from chatbind_cli.numerals import whole_number

# ids from here on are not of srun: the batch script, an interactive allocation, ...
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
# below the ports that Linux gives to outgoing connections
_FIRST_PORT, _PORTS = 20000, 12000
_STEPS_APART = 17


@dataclass(frozen=True)
class Task:
    """One of the processes that `srun` has started together.

    Attributes:
        step: job and step, `4711.0`.
        rank: its number among all of them.
        local_rank: its number on its machine.
        node: its machine's number.
        hosts: the machines' names.
        tasks: how many there are.
        local_tasks: how many there are on its machine, as far as that is known.
        local_cpus: what the job was given there, for all of them; None: unknown.
    """

    step: str
    rank: int
    local_rank: int
    node: int
    hosts: tuple[str, ...]
    tasks: int
    local_tasks: int
    local_cpus: int | None = None

    @property
    def one_a_machine(self) -> bool:
        """Whether each machine has one, which then has to start the machine's workers."""
        return self.tasks == len(self.hosts)

    @property
    def port(self) -> int:
        """A port for this step to meet at; steps that share a machine have others."""
        job, _, step = self.step.partition(".")
        return _FIRST_PORT + (int(job) * _STEPS_APART + int(step)) % _PORTS

    def cpus(self, seen: int) -> int:
        """The CPUs of this task, which sees its own alone, or those of all tasks of its machine."""
        return max(1, min(seen, (self.local_cpus or seen) // self.local_tasks))


def task() -> Task | None:
    """This process as a task of a step of `srun`, None if it is not one."""
    step = _number("SLURM_STEP_ID", "SLURM_STEPID")
    rank, tasks = _number("SLURM_PROCID"), _number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if step is None or step >= _FIRST_SPECIAL_STEP or rank is None or tasks is None:
        return None
    nodes = _first("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    hosts = tuple(expand(nodes)) or (host(),)
    node = _number("SLURM_NODEID") or 0
    return Task(
        step=f"{_number('SLURM_JOB_ID', 'SLURM_JOBID') or 0}.{step}",
        rank=rank,
        local_rank=_number("SLURM_LOCALID") or 0,
        node=node,
        hosts=hosts,
        tasks=tasks,
        local_tasks=_tasks_of(node) or max(1, tasks // len(hosts)),
        local_cpus=_number("SLURM_CPUS_ON_NODE"),
    )


def machines_outside_of_step() -> int:
    """The machines of a job whose `sbatch` script, or shell, this process is of; else 0."""
    return 0 if task() else _number("SLURM_JOB_NUM_NODES", "SLURM_NNODES") or 0


def host() -> str:
    """This machine's name, as SLURM calls it where it runs."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def expand(hosts: str) -> Iterator[str]:
    """The hosts of SLURM's compressed list: `gpu-[01-02,7]-ib,x` -> gpu-01-ib gpu-02-ib gpu-7-ib x.

    A name may have several brackets; the last one counts fastest.
    """
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", hosts):
        # texts and insides of brackets in turn
        parts = re.split(r"\[([^\]]*)\]", name)
        choices = [list(_counted(part)) if i % 2 else [part] for i, part in enumerate(parts)]
        yield from map("".join, product(*choices))


def _counted(ranges: str) -> Iterator[str]:
    """`03-05,9` -> 03 04 05 9."""
    for piece in ranges.split(","):
        low, _, high = piece.partition("-")
        if not high:
            yield low
        else:
            yield from (f"{n:0{len(low)}}" for n in range(int(low), int(high) + 1))


def _tasks_of(node: int) -> int | None:
    """The tasks of a machine, by what is written as `4(x2),3`: 4, 4 and 3."""
    written = _first("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", written):
        counts += [int(count)] * int(times or 1)
    return counts[node] if node < len(counts) else None


def _first(*names: str) -> str:
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def _number(*names: str) -> int | None:
    return whole_number(_first(*names))

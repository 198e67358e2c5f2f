"""On how many processes and machines a command runs, by its options and by SLURM's variables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from chatbind_cli import hardware, slurm
from chatbind_cli.console import note
from chatbind_cli.errors import UsageError
from chatbind_cli.meeting import Meeting, Member

_DEFAULT_PORT = 29500


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """On how many processes and machines a command runs; None: SLURM's or the machine's own.

    Attributes:
        one_a_machine: whether a process takes all GPUs of its machine.
        task: one of several tasks that `srun` has started on a machine; it has one worker.
        meeting: with the other machines, or tasks.
    """

    num_processes: int | None = None
    num_machines: int | None = None
    machine_rank: int | None = None
    main_address: str | None = None
    launch_config: Path | None = None
    device: str = "auto"
    one_a_machine: bool = False
    dry_run: bool = False
    sbatch: bool = False
    task: slurm.Task | None = None
    meeting: Meeting | None = None

    def __post_init__(self) -> None:
        if self.sbatch:  # nothing runs here
            object.__setattr__(self, "dry_run", True)

    def with_slurm(self) -> Dispatch:
        """Fills what is None from the step of SLURM, and where to meet as torchrun does.

        Raises:
            UsageError: the step was started in a way that does not go with what was asked.
        """
        task = slurm.task()
        host, _, port = (self.main_address or "").partition(":")
        host = host or os.environ.get("MASTER_ADDR") or (task.hosts[0] if task else "")
        port = port or os.environ.get("MASTER_PORT") or str(task.port if task else _DEFAULT_PORT)
        plan = replace(self, main_address=f"{host}:{port}" if host else None)
        if task is None or task.tasks == 1:
            return plan
        if task.one_a_machine:
            machines = self.num_machines or task.tasks
            rank = task.node if self.machine_rank is None else self.machine_rank
            return replace(plan, num_machines=machines, machine_rank=rank)
        if self.num_processes not in (None, task.tasks) or self.launch_config is not None:
            raise UsageError(
                f"srun has started {task.tasks} tasks on {len(task.hosts)} machine(s), each of "
                "which is one worker",
                hint="with --num-processes or --launch-config start one a machine: "
                "srun --ntasks-per-node=1",
            )
        return replace(plan, num_processes=task.tasks, task=task)

    @property
    def machines(self) -> int:
        """How many machines are launched on, each with workers of its own."""
        return 1 if self.task else self.num_machines or 1

    @property
    def uses_gpu(self) -> bool:
        """Whether the work is done on GPUs."""
        if self.device == "cpu":
            return False
        return self.device.startswith("cuda") or hardware.gpu_count() > 0

    @property
    def wanted_processes(self) -> int:
        """The workers of all machines."""
        if self.num_processes is not None:
            return self.num_processes
        several = self.device in ("auto", "cuda") and not self.one_a_machine
        gpus = hardware.gpu_count() if several else 0
        return self.machines * max(1, gpus)

    @property
    def workers_here(self) -> int:
        """The workers that this process starts.

        Raises:
            UsageError: they cannot be shared out evenly.
        """
        if self.task is not None:
            return 1
        if self.wanted_processes % self.machines:
            raise UsageError(
                f"--num-processes {self.wanted_processes} cannot be shared out evenly to "
                f"{self.machines} machines",
                hint="it counts those of all machines",
            )
        return self.wanted_processes // self.machines

    def address(self) -> tuple[str, int]:
        """Where the machines meet, and after them the workers.

        Raises:
            UsageError: nothing tells.
        """
        if self.main_address is None:
            raise UsageError(
                "several machines need --main-address HOST:PORT",
                hint="name machine 0 and a free port of it",
            )
        host, _, port = self.main_address.partition(":")
        if not port.isdecimal():
            raise UsageError(f"--main-address {self.main_address}: {port!r} is no port")
        return host, int(port)

    def member(self) -> Member | None:
        """What this process is at the meeting; None where it is alone.

        Raises:
            UsageError: the machine's number is not one of them.
        """
        task, wanted = slurm.task(), self.wanted_processes
        step = task.step if task else ""
        if self.task is not None:
            rank = self.task.rank
            return Member(rank, wanted, slurm.host(), rank, wanted, step, kind="process")
        if self.machines == 1:
            self._say_what_is_idle()
            return None
        rank = self.machine_rank or 0
        if rank >= self.machines:
            raise UsageError(
                f"--machine-rank {rank} is none of {self.machines} machines", hint="0 is the first"
            )
        first = rank * self.workers_here
        return Member(rank, self.machines, slurm.host(), first, wanted, step)

    def _say_what_is_idle(self) -> None:
        machines = slurm.machines_outside_of_step()
        if self.num_machines is None and machines > 1:
            note(
                f"this job has {machines} machines, and works on this one alone: only what `srun` "
                "starts works on all of them"
            )

    @property
    def hosts(self) -> Sequence[str]:
        """The names of the machines, where SLURM tells them."""
        task = slurm.task()
        return task.hosts if task else ()

    def variables(self) -> dict[str, str]:
        """What the workers, or their launcher, are told by the environment."""
        values = {} if self.uses_gpu else {"ACCELERATE_USE_CPU": "true"}
        if self.task is not None:
            host, port = self.address()
            local = self.task.local_rank
            if self.uses_gpu:
                # SLURM may show each task a GPU of its own, or each of them all GPUs
                local %= max(1, hardware.gpu_count())
            values |= {"RANK": str(self.task.rank), "WORLD_SIZE": str(self.task.tasks)}
            values |= {"LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(self.task.local_tasks)}
            values |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
        return values

    def preferences(self) -> dict[str, str]:
        """What the environment tells the workers where the user has not said it."""
        cpus = hardware.cpu_count()
        threads = self.task.cpus(cpus) if self.task else max(1, cpus // self.workers_here)
        values = {"OMP_NUM_THREADS": str(threads)}
        if self.meeting is not None and self.meeting.interface is not None:
            values["GLOO_SOCKET_IFNAME"] = self.meeting.interface
        return {name: value for name, value in values.items() if name not in os.environ}

"""The CPUs and GPUs that this process may use, counted without torch.

They are fewer than the machine has in a container, or in a job of SLURM's.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def cpu_count() -> int:
    """The CPUs that the scheduler gives this process, by its affinity and its cgroup's quota."""
    count = os.cpu_count() or 1
    with suppress(AttributeError):  # Linux alone has it
        count = len(os.sched_getaffinity(0))
    quota = _quota()
    return max(1, min(count, int(quota))) if quota else count


def gpu_count() -> int:
    """The number of NVIDIA GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def _quota() -> float | None:
    """The share of CPUs of this process's cgroup (version 2) and those above it, 2.5 for 2.5."""
    shares = []
    with suppress(OSError):
        own = _OWN_CGROUP.read_text().rpartition("0::/")[2].strip()
        group = _CGROUPS / own.strip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):
                allowed, period = (folder / "cpu.max").read_text().split()
                if allowed != "max":
                    shares.append(int(allowed) / int(period))
    return min(shares, default=None)

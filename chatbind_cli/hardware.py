"""The CPUs, GPUs and network interfaces that this process may use, told without torch.

They are fewer than the machine has in a container, or in a job of SLURM's.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_ADDRESSES_6 = Path("/proc/net/if_inet6")
_SIOCGIFADDR = 0x8915
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


def interface_of(address: str) -> str | None:
    """The name of the network interface that has an address, None where none is found."""
    with suppress(OSError):
        if ":" in address:
            packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
            rows = [row.split() for row in _ADDRESSES_6.read_text().splitlines()]
            return next((row[-1] for row in rows if row[0] == packed), None)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # it has no address
                    asked = struct.pack("256s", name.encode()[:15])
                    found = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, asked)[20:24]
                    if socket.inet_ntoa(found) == address:
                        return name
    return None

"""The CPUs, GPUs, memory and network interfaces that this process may use, told without torch.

They are fewer than the machine has in a container, or in a job of SLURM's.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path

_CPUS = Path("/proc/cpuinfo")
_MEMORY = Path("/proc/meminfo")
_BFLOAT16 = {"amx_bf16", "avx512_bf16", "bf16"}  # on Intel and AMD, and on ARM
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


def multiplies_bfloat16() -> bool:
    """Whether the CPUs have units for bfloat16, with which it is faster than float32."""
    with suppress(OSError):
        lines = _CPUS.read_text().splitlines()
        words = {
            word
            for line in lines
            if line.startswith(("flags", "Features"))
            for word in line.split()
        }
        return bool(words & _BFLOAT16)
    return False


def memory() -> tuple[int, int] | None:
    """Bytes that programs may have here, and those of them that are free; None: it cannot be told.

    By the machine and this process's cgroup. What the kernel holds of files is free.
    """
    found = []
    with suppress(OSError, ValueError, KeyError):
        said = dict(line.split(":") for line in _MEMORY.read_text(encoding="ascii").splitlines())
        sizes = (int(said[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
        found.append(tuple(sizes))
    for folder in _groups():
        with suppress(OSError, ValueError, KeyError):
            most, used = (int((folder / f"memory.{n}").read_text()) for n in ("max", "current"))
            told = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            found.append(
                (most, most - used + int(told["inactive_file"]) + int(told["active_file"]))
            )
    if not found:
        return None
    everything, free = (min(sizes) for sizes in zip(*found, strict=True))
    return everything, max(0, free)


def gpu_count() -> int:
    """The number of NVIDIA GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def _groups() -> list[Path]:
    """The folder of this process's cgroup (version 2), and those above it."""
    with suppress(OSError):
        own = _OWN_CGROUP.read_text().rpartition("0::/")[2].strip()
        group = _CGROUPS / own.strip("/")
        return [group, *group.parents]
    return []


def _quota() -> float | None:
    """The share of CPUs of this process's cgroup and those above it, 2.5 for 2.5."""
    shares = []
    for folder in _groups():
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

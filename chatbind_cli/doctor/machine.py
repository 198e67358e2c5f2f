"""Devices and the numbers that they can multiply; memory and disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from chatbind_cli.doctor.finding import NOTE, OK, PROBLEM, Finding

_DTYPES = ("float32", "bfloat16", "float16")
# ImageBind-Huge and a 7B model in half precision, with room to work.
_MEMORY_FOR_7B = 20e9
# Base, delta and target of a 7B model, and ImageBind-Huge.
_DISK_FOR_7B = 46e9


def look_at_devices() -> Iterator[Finding]:
    """A finding a device: what it is, its memory, and the dtypes that it multiplies."""
    import torch

    names = ["cpu"]
    if torch.cuda.is_available():
        names += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    for name in names:
        yield _device(name)
    if len(names) == 1:
        hint = "a 7B model takes minutes an answer on a CPU"
        yield Finding("device", "gpu", NOTE, "none that PyTorch can use", hint)


def _device(name: str) -> Finding:
    import torch

    what = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if name.startswith("cuda"):
        facts = torch.cuda.get_device_properties(name)
        what = f"{facts.name}, {facts.total_memory / 1e9:.1f} GB"
    works = [dtype for dtype in _DTYPES if _multiplies(name, dtype)]
    if "float32" not in works:
        hint = "check the driver and PyTorch's build"
        return Finding("device", name, PROBLEM, f"{what}; cannot multiply", hint)
    return Finding("device", name, OK, f"{what}; {', '.join(works)}")


def _multiplies(device: str, dtype: str) -> bool:
    import torch

    try:
        matrix = torch.eye(8, device=device, dtype=getattr(torch, dtype))
        return float((matrix @ matrix).sum()) == 8.0
    except (RuntimeError, TypeError):
        return False


def look_at_room(folder: Path) -> Iterator[Finding]:
    """Free memory, and free disk where `folder` is (or would be)."""
    memory = _available_memory()
    if memory is not None:
        yield _room("memory", memory, _MEMORY_FOR_7B, "a 7B model with ImageBind-Huge")
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    yield _room("disk", free, _DISK_FOR_7B, "base, delta and sum of a 7B model")


def _room(name: str, free: int, wanted: float, purpose: str) -> Finding:
    value = f"{free / 1e9:.1f} GB free"
    if free >= wanted:
        return Finding("room", name, OK, value)
    return Finding("room", name, NOTE, value, f"{purpose} wants {wanted / 1e9:.0f} GB")


def _available_memory() -> int | None:
    """Memory that a new program may have, in bytes; None where it cannot be told."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None

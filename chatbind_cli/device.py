"""Where a model runs and in which numbers: the words of `--device` and `--dtype` made definite.

Knows nothing of models.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from chatbind_cli.errors import UsageError

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def resolve_device(name: str) -> torch.device:
    """The device that a word means; a launched worker gets the GPU of its local rank.

    Raises:
        UsageError: there is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"{name!r} is no device", hint="try auto, cpu, cuda or cuda:0") from error
    if device.type == "cuda":
        return _gpu(name, device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("there is no mps device here", hint="try --device cpu")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number type that a word means; `auto`: float32 on a CPU, bfloat16 elsewhere.

    Raises:
        UsageError: there is no such type.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise UsageError(f"{name!r} is no dtype", hint=f"choose one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _gpu(name: str, device: torch.device) -> torch.device:
    count = torch.cuda.device_count()
    index = device.index
    if index is None:
        index = int(os.environ.get("LOCAL_RANK", "0"))
    if not 0 <= index < count:
        raise UsageError(f"there is no {name} here", hint=f"{count} GPU(s) were found")
    return torch.device("cuda", index)


@contextmanager
def one_thread() -> Iterator[None]:
    """Has torch compute on one thread; what it was before is restored."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Where a model that answers is held, and in which numbers: its options made definite."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from chatbind_cli.checkpoints.checkpoint import open_checkpoint
from chatbind_cli.console import note
from chatbind_cli.device import resolve_dtype
from chatbind_cli.errors import CheckpointError, UsageError, WeightsError
from chatbind_cli.hardware import memory, multiplies_bfloat16

_HALF = (torch.bfloat16, torch.float16)
_SHARE = 0.8
"""Of the free memory that weights may take; answers want some, too."""
_ENCODER_BYTES = 3 * 2**30
"""Room for ImageBind-Huge on the first GPU."""


def resolve_numbers(name: str, device: torch.device, folder: Path) -> torch.dtype:
    """The number type in which the weights of a folder answer on a device.

    `auto` on a CPU: float32, which weights of any type become exactly. But bfloat16 stays what it
    is where the CPU has units for it; and two-byte weights become (or stay) bfloat16, as on a
    GPU, where twice their size would not fit.

    Raises:
        UsageError: there is no such type.
    """
    numbers = resolve_dtype(name, device)
    if name != "auto" or device.type != "cpu":
        return numbers
    count: Counter[torch.dtype] = Counter()
    try:
        checkpoint = open_checkpoint(folder)
    except (CheckpointError, WeightsError):
        return numbers  # what is wrong with it is said where it is loaded
    for info in checkpoint.tensors.values():
        count[info.dtype] += info.numel
    [(saved, _)] = count.most_common(1) or [(numbers, 0)]
    if saved not in _HALF or "quantization_config" in checkpoint.config:
        return numbers
    if saved is torch.bfloat16 and multiplies_bfloat16() and torch.backends.mkldnn.is_available():
        return saved
    needed, room = 4 * count.total(), _room()
    if room is None or needed <= room:
        return numbers
    note(
        f"answers in bfloat16: in float32 the weights would take {needed / 1e9:.1f} GB, and there "
        f"is room for {room / 1e9:.1f} (--dtype float32 takes it all the same)"
    )
    return torch.bfloat16


def _room() -> float | None:
    """Bytes that the weights of this process may take; None: it cannot be told.

    Of several workers each has an equal share of what the machine has, whatever is free when it
    looks: all are to decide alike.
    """
    found, workers = memory(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if found is None:
        return None
    everything, free = found
    return _SHARE * (free if workers == 1 else everything / workers)


def check_device_map(device_map: str | None, device: str) -> None:
    """Refuses two words for one thing.

    Raises:
        UsageError: both options say where the model is.
    """
    if device_map is not None and device not in ("auto", device_map):
        raise UsageError(
            f"--device {device} and --device-map {device_map} both say where the model is",
            hint="leave one of them out",
        )


def spread(model: PreTrainedModel) -> None:
    """Puts a model's layers on all GPUs evenly, and what does not fit there into memory.

    Without a GPU all of it stays in memory.

    Raises:
        CheckpointError: both together are too small.
    """
    from accelerate import dispatch_model  # noqa: PLC0415  seconds, which few runs need
    from accelerate.utils import get_balanced_memory, get_max_memory  # noqa: PLC0415

    room = get_max_memory()
    if 0 in room:
        room[0] = max(0, room[0] - _ENCODER_BYTES)
    whole = sorted(model._no_split_modules or ())
    device_map = plan_layers(model, get_balanced_memory(model, room, no_split_module_classes=whole))
    if len(set(device_map.values())) == 1:
        model.to(torch.device(next(iter(device_map.values()))))  # type: ignore[arg-type]
        return
    # caches are not copied from layer to layer: each part lies where its layer is
    dispatch_model(model, device_map, skip_keys=sorted(model._skip_keys_device_placement or ()))


def plan_layers(model: PreTrainedModel, room: Mapping[Any, Any]) -> dict[str, int | str]:
    """The GPU (by its number) or `cpu` for each part of a model, by the names of modules.

    Args:
        model: of any size, also on the `meta` device.
        room: bytes on each GPU, by its number, and on the `cpu`.

    Raises:
        CheckpointError: there is not enough.
    """
    from accelerate import infer_auto_device_map  # noqa: PLC0415

    whole = sorted(model._no_split_modules or ())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a few bytes for buffers
        found: dict[str, Any] = infer_auto_device_map(
            model, dict(room), no_split_module_classes=whole
        )
    if "disk" in found.values():
        raise CheckpointError(
            "the model is larger than GPUs and memory together",
            where=model.name_or_path,
            hint="--load-in 4bit packs it on the GPUs, where it then must fit",
        )
    return found

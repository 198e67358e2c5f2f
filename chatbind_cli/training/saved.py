"""Opens what was saved again, before it counts: a file that cannot be used is found at once."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.filesystem import FileSystemReader

from chatbind_cli.checkpoints.checkpoint import open_checkpoint
from chatbind_cli.errors import CheckpointError, WeightsError

_PIECE = 1 << 24  # elements
_HINT = "nothing took its name, and what was saved before it stays; run the same command again"


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def saving(staging: Path) -> Iterator[None]:
    """Takes away again, where saving fails, what it has left in a folder.

    Raises:
        CheckpointError: the disk is full, in whatever words a library says so.
    """
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in _FULL
        full |= isinstance(error, SafetensorError) and "I/O error" in str(error)
        # torch's writer has no words for it
        full |= isinstance(error, RuntimeError) and "inline_container" in str(error)
        shutil.rmtree(staging, ignore_errors=True)
        if full:
            raise CheckpointError(
                "cannot be saved: the disk is full, or files may not be as large",
                where=str(staging.parent),
                hint="what was saved before stays; make room and run the same command again",
            ) from error
        raise


def check_weights(path: Path, saved: Mapping[str, torch.Tensor]) -> None:
    """Reads a weights file, or a folder of them, piece by piece.

    Args:
        path: of the file or folder.
        saved: what was to be saved, by name; tied tensors, which share memory, count once. Names
            that the file knows by others are compared by the number of their elements alone.

    Raises:
        WeightsError: a tensor is missing, has another shape, holds what is not a finite number, or
            is a matrix of zeros that was none in memory; the projector's must not be one at all.
    """
    with open_checkpoint(path) as checkpoint:
        found = checkpoint.tensors
        for name, info in found.items():
            tensor = saved.get(name)
            if tensor is not None and tuple(tensor.shape) != info.shape:
                shapes = f"{list(info.shape)} in place of {list(tensor.shape)}"
                raise WeightsError(f"{name} was saved as {shapes}", where=str(path), hint=_HINT)
            zero = _is_zero(name, checkpoint.chunks(name, _PIECE), path) and len(info.shape) > 1
            if zero and ("projector" in name or (tensor is not None and bool(tensor.any()))):
                raise WeightsError(f"{name} holds nothing but zeros", where=str(path), hint=_HINT)
        once = {(tensor.data_ptr(), tensor.shape): tensor for tensor in saved.values()}
        wanted = sum(tensor.numel() for tensor in once.values())
        total = sum(info.numel for info in found.values())
        if total != wanted or not wanted:
            raise WeightsError(
                f"holds {total:,} of {wanted:,} numbers", where=str(path), hint=_HINT
            )


def check_optimizer(path: Path) -> None:
    """Reads an optimizer's file, which is mapped and not held.

    Raises:
        WeightsError: it cannot be read, or holds what is not a finite number.
    """
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise WeightsError("cannot be read again", where=str(path), hint=_HINT) from error
    for tensor in _tensors(state):
        if tensor.is_floating_point():
            _is_zero("the optimizer's state", iter(tensor.flatten().split(_PIECE)), path)


def check_shards(folder: Path, rank: int) -> None:
    """Reads what process `rank` has written of a model that is shared out, and of its optimizer.

    Raises:
        WeightsError: it cannot be read, or holds what is not a finite number.
    """
    placed = FileSystemReader(folder).read_metadata().storage_data
    for index, place in placed.items():
        path = folder / place.relative_path
        if not path.name.startswith(f"__{rank}_"):
            continue
        try:
            with path.open("rb") as file:
                file.seek(place.offset)
                held = torch.load(BytesIO(file.read(place.length)), weights_only=True)
        except Exception as error:
            raise WeightsError("cannot be read again", where=str(path), hint=_HINT) from error
        for tensor in _tensors(held):
            _is_zero(index.fqn, iter(tensor.flatten().split(_PIECE)), path)


def _is_zero(name: str, pieces: Iterator[torch.Tensor], path: Path) -> bool:
    """Whether all numbers are zero.

    Raises:
        WeightsError: one is not finite.
    """
    zero = True
    for piece in pieces:
        if not piece.is_floating_point():
            return False
        low, high = torch.aminmax(piece)  # NaN where one number is
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise WeightsError(f"{name} is not finite any more", where=str(path), hint=_HINT)
        zero = zero and not bool(low) and not bool(high)
    return zero


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor) and value.numel():
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)

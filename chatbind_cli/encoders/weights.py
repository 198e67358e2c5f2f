"""Weights of encoders: compared with what a config makes of them, and mapped.

They stay on the disk until they are used, so that processes share one copy of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from chatbind_cli.checkpoints.safetensors_file import TensorFile, TensorInfo
from chatbind_cli.errors import WeightsError

Shapes = Mapping[str, tuple[int, ...]]

_HINT = "are these {}'s weights, and the config.json that belongs to them?"


def check_blocks(wanted: int, tensors: int, where: str, whose: str) -> None:
    """Refuses a config with more blocks than a file has tensors, before any is made.

    Raises:
        WeightsError: both numbers are told, and in the hint `whose` weights they should be.
    """
    if wanted > tensors:
        raise WeightsError(
            f"the config wants {wanted} blocks, and the file has {tensors} tensors",
            where=where,
            hint=_HINT.format(whose),
        )


def check_shapes(found: Shapes, wanted: Shapes, where: str, whose: str) -> None:
    """Compares the shapes of a file's tensors with those that a config makes, by name.

    Raises:
        WeightsError: the first name that differs is told with both shapes; hint as above.
    """
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            there, by_config = (_shape(shapes.get(name)) for shapes in (found, wanted))
            raise WeightsError(
                f"{name} is {there} in the file and {by_config} by the config",
                where=where,
                hint=_HINT.format(whose),
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def map_tensors(files: Iterable[TensorFile], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Some of the tensors of files, in their own dtype; nothing is read before it is used.

    Writing to one of them changes no file.

    Raises:
        WeightsError: a file cannot be mapped, or a tensor holds no floating-point numbers.
    """
    wanted = set(names)
    mapped: dict[str, torch.Tensor] = {}
    for file in files:
        here = {name: info for name, info in file.tensors.items() if name in wanted}
        if not here:
            continue
        where = str(file.path)
        try:
            size = file.path.stat().st_size
            data = torch.from_file(where, shared=False, size=size, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            raise WeightsError("cannot be read", where=where) from error
        for name, info in here.items():
            if not info.dtype.is_floating_point:
                raise WeightsError(f"{name} holds {info.dtype}", where=where)
            mapped[name] = _tensor(data, info)
    return mapped


def _tensor(data: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    """One tensor of the bytes of a file; copied where it is turned or lies between two numbers."""
    elements = info.numel
    if info.strides is not None:
        elements = 1 + sum((n - 1) * step for n, step in zip(info.shape, info.strides, strict=True))
    part = data[info.begin : info.begin + elements * info.dtype.itemsize]
    numbers = (part.clone() if info.begin % info.dtype.itemsize else part).view(info.dtype)
    if info.strides is None:
        return numbers.view(info.shape)
    return numbers.as_strided(info.shape, info.strides, numbers.storage_offset()).contiguous()

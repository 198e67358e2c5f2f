"""What one weights file holds, safetensors or torch's, behind one door.

Names, shapes, dtypes and places come without the data, which `checkpoint` reads. Nothing in a file
is ever executed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from chatbind_cli.checkpoints.torch_file import read_torch
from chatbind_cli.errors import WeightsError

SAFETENSORS_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_LONGEST_NAME = 1000
_LONGEST_HEADER = 8 << 20  # bytes; 10,000 tensors take one MiB


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor before its data are read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorFile:
    """What a file of named tensors holds, and where in it.

    Attributes:
        path: where it lies.
        tensors: name -> shape and dtype, in the file's own order.
        begin: name -> position of the tensor's first element in the file, in bytes.
        strides: name -> strides in elements, of the tensors that do not lie in row-major order.
        metadata: what a safetensors file says beside its tensors.

    Raises:
        WeightsError: a name is longer than any, or not printable.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    begin: Mapping[str, int]
    strides: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.tensors:
            # they stand in messages, and no model has others
            if len(name) > _LONGEST_NAME or not name.isprintable():
                raise WeightsError("has a tensor whose name is none", where=str(self.path))


def open_tensor_file(path: Path) -> TensorFile:
    """Looks into a weights file, by its content, whatever its name ends in.

    Raises:
        WeightsError: it is neither safetensors nor a torch file, is cut short, or holds anything
            but named tensors.
    """
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise WeightsError(error.strerror or "cannot be read", where=str(path)) from error
    if len(head) == 9 and head[8:9] == b"{":
        return _open_safetensors(path)
    if head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return _open_torch(path)
    if head.startswith(b"version h"):
        raise WeightsError(
            "is a Git LFS pointer, not the weights",
            where=str(path),
            hint="fetch the file itself, for instance with `chatbind download`",
        )
    raise WeightsError("is neither a safetensors nor a torch file", where=str(path))


def _open_safetensors(path: Path) -> TensorFile:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of more than {_LONGEST_HEADER >> 20} MiB")
            # The library checks what a forged header could lie about: offsets that overlap,
            # leave holes or reach past the end, sizes that do not fit the shapes.
            with safe_open(str(path), framework="pt"):
                header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"not a valid safetensors file ({error})", where=str(path)) from error
    metadata = header.pop("__metadata__", None) or {}
    tensors: dict[str, TensorInfo] = {}
    begin: dict[str, int] = {}
    for name, entry in header.items():
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise WeightsError(
                f"tensor {name} has the unknown dtype {entry['dtype']}", where=str(path)
            )
        tensors[name] = TensorInfo(tuple(entry["shape"]), dtype)
        begin[name] = 8 + length + int(entry["data_offsets"][0])
    return TensorFile(path, tensors, begin, metadata=metadata)


def _open_torch(path: Path) -> TensorFile:
    found = read_torch(path)
    return TensorFile(
        path,
        {name: TensorInfo(view.shape, view.dtype) for name, (view, _) in found.items()},
        {name: begin for name, (_, begin) in found.items()},
        strides={
            name: view.strides
            for name, (view, _) in found.items()
            if view.nbytes and not view.is_row_major
        },
    )

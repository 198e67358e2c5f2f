"""What one weights file holds: names, shapes, dtypes and places, without the data.

Here for safetensors; files of torch's are in `torch_file`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

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
    """What is known of a tensor before its data are read.

    Attributes:
        shape: its sizes.
        dtype: its numbers.
        begin: where in its file its first element lies, in bytes.
        strides: in elements; None where they lie in row-major order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int = field(default=0, compare=False)
    strides: tuple[int, ...] | None = field(default=None, compare=False)

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
    """What a file of named tensors holds.

    Attributes:
        path: where it lies.
        tensors: name -> tensor, in the file's own order.
        metadata: what a safetensors file says beside its tensors.

    Raises:
        WeightsError: a name is longer than any, or not printable.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.tensors:
            # they stand in messages, and no model has others
            if len(name) > _LONGEST_NAME or not name.isprintable():
                raise WeightsError("has a tensor whose name is none", where=str(self.path))


def open_safetensors(path: Path) -> TensorFile:
    """Looks into a safetensors file.

    Raises:
        WeightsError: the file is broken or cut short.
    """
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
    for name, entry in header.items():
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise WeightsError(
                f"tensor {name} has the unknown dtype {entry['dtype']}", where=str(path)
            )
        begin = 8 + length + int(entry["data_offsets"][0])
        tensors[name] = TensorInfo(tuple(entry["shape"]), dtype, begin)
    return TensorFile(path, tensors, metadata)

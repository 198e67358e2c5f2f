"""One weights file, safetensors or torch's, read piece by piece behind one door.

Names, shapes and dtypes come without the data; data come by offset and length into memory that the
caller brings, so memory stays bounded however large the file, and nothing is mapped. Nothing in a
file is ever executed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from chatbind_cli.errors import WeightsError
from chatbind_cli.weights.torch_file import read_torch

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


def open_tensor_file(path: Path) -> TensorFile:
    """Opens a weights file by its content, whatever its name ends in.

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
    metadata = header.pop("__metadata__", None)
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


class TensorFile:
    """A file of named tensors.

    Raises:
        WeightsError: a name is longer than any, or not printable.

    Args:
        path: where it lies.
        tensors: name -> shape and dtype, in the file's own order.
        begin: name -> position of the tensor's first element in the file, in bytes.
        strides: name -> strides in elements, of the tensors that do not lie in row-major order.
        metadata: what a safetensors file says beside its tensors.
    """

    def __init__(
        self,
        path: Path,
        tensors: dict[str, TensorInfo],
        begin: Mapping[str, int],
        *,
        strides: Mapping[str, tuple[int, ...]] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        for name in tensors:
            # they stand in messages, and no model has others
            if len(name) > _LONGEST_NAME or not name.isprintable():
                raise WeightsError("has a tensor whose name is none", where=str(path))
        self.path = path
        self.tensors = tensors
        self.metadata = dict(metadata or {})
        self._begin = begin
        self._strides = strides or {}
        self._handle: int | None = None
        self._turned: tuple[str, torch.Tensor] | None = None

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fills `out` with a tensor's elements from `start` on, in row-major order.

        Args:
            name: the tensor.
            start: number of the first element.
            out: 1-D, contiguous, of the tensor's dtype.

        Raises:
            WeightsError: the data cannot be read.
        """
        if name in self._strides:
            out.copy_(self._in_row_major_order(name)[start : start + out.numel()])
        elif out.numel():
            self._fill(name, self._begin[name] + start * out.dtype.itemsize, out)

    def read_flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of a tensor in row-major order, as a fresh 1-D tensor.

        Raises:
            WeightsError: the data cannot be read.
        """
        piece = torch.empty(stop - start, dtype=self.tensors[name].dtype)
        self.read_into(name, start, piece)
        return piece

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, fresh in memory.

        Raises:
            WeightsError: the data cannot be read.
        """
        info = self.tensors[name]
        return self.read_flat(name, 0, info.numel).view(info.shape)

    def _in_row_major_order(self, name: str) -> torch.Tensor:
        """A tensor that was saved turned or with gaps: read whole, and kept for its next piece."""
        if self._turned is None or self._turned[0] != name:
            info, strides = self.tensors[name], self._strides[name]
            steps = ((size - 1) * stride for size, stride in zip(info.shape, strides, strict=True))
            span = torch.empty(1 + sum(steps), dtype=info.dtype)
            self._fill(name, self._begin[name], span)
            self._turned = (name, span.as_strided(info.shape, strides).reshape(-1))
        return self._turned[1]

    def _fill(self, name: str, position: int, out: torch.Tensor) -> None:
        view = out.view(torch.uint8).numpy().data
        try:
            if self._handle is None:
                self._handle = os.open(self.path, os.O_RDONLY)
                if hasattr(os, "posix_fadvise"):  # the kernel reads further ahead
                    os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while view:
                n = os.preadv(self._handle, [view], position)
                if not n:
                    raise WeightsError("ends before its last tensor", where=str(self.path))
                view, position = view[n:], position + n
        except OSError as error:
            raise WeightsError(f"tensor {name}: {error}", where=str(self.path)) from error

    def release(self) -> None:
        """Gives back memory and the handle; the next read opens the file again."""
        if self._handle is not None:
            os.close(self._handle)
        self._handle = None
        self._turned = None

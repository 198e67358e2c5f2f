"""Safetensors files: what one holds, without its data, and one written in pieces.

Both ways memory holds no more than a piece: the header comes first and says every size.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from chatbind_cli.errors import WeightsError

_DTYPES: Mapping[str, torch.dtype] = {
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

_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_BLOCK_BYTES = 8 << 20
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
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise WeightsError(
                f"tensor {name} has the unknown dtype {entry['dtype']}", where=str(path)
            )
        begin = 8 + length + int(entry["data_offsets"][0])
        tensors[name] = TensorInfo(tuple(entry["shape"]), dtype, begin)
    return TensorFile(path, tensors, metadata)


class SafetensorsWriter:
    """A safetensors file in the making. A context manager; the file is synced when it is whole.

    Args:
        path: the file to create.
        tensors: every tensor that will be written.

    Attributes:
        order: the names, in the order in which their data have to come.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.path = path
        # The format wants data aligned to their element size: wide elements go first, else in
        # the order given. Python's sort is stable.
        self.order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
        self._expected = sum(info.nbytes for info in tensors.values())
        self._written = 0
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in self.order:
            info = tensors[name]
            if info.dtype not in _DTYPE_NAMES:
                raise WeightsError(f"tensor {name} has a dtype that cannot be stored: {info.dtype}")
            header[name] = {
                "dtype": _DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.nbytes],
            }
            offset += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        self._header = text + b" " * (-len(text) % 8)

    def __enter__(self) -> SafetensorsWriter:
        """Creates the file and writes the header."""
        with self._one_line():
            self._file = _OutputFile(self.path)
            self._file.write(len(self._header).to_bytes(8, "little") + self._header)
        return self

    def append(self, piece: torch.Tensor) -> memoryview:
        """Writes the next piece of the tensor whose turn it is, in `order`.

        Returns:
            The bytes that were written (for hashing), valid while `piece` is.
        """
        data = bytes_of(piece)
        with self._one_line():
            self._file.write(data)
        self._written += len(data)
        return data

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WeightsError(
                f"cannot be written ({error.strerror})",
                where=str(self.path),
                hint="make room and run the same command again: it goes on where it stopped",
            ) from error

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Syncs and closes; checks that every byte the header promised has come."""
        with self._one_line():
            self._file.close(whole=kind is None)
        if kind is None and self._written != self._expected:
            raise ValueError(f"{self._written} bytes written, {self._expected} in the header")


def bytes_of(piece: torch.Tensor) -> memoryview:
    """The bytes of a tensor as they stand in memory (little-endian machines only, like torch)."""
    flat = piece.detach().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


class _OutputFile:
    """A file written front to back in large aligned blocks, around the page cache.

    Tens of gigabytes would push everything else out of the cache, and finding room for them in it
    takes time. Where the file system knows no direct I/O, the cache is used.

    Raises:
        OSError: it cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._handle = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._handle = os.open(path, flags, 0o666)
        # pages of their own: direct I/O wants aligned memory
        self._block = np.frombuffer(mmap.mmap(-1, _BLOCK_BYTES), dtype=np.uint8)
        self._filled = self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Writes the next bytes."""
        left = np.frombuffer(data, dtype=np.uint8)
        self._size += left.size
        while left.size:
            count = min(left.size, self._block.size - self._filled)
            self._block[self._filled : self._filled + count] = left[:count]
            left = left[count:]
            self._filled += count
            if self._filled == self._block.size:
                self._flush()

    def _flush(self) -> None:
        # direct I/O wants whole pages, too; what is too much at the end is cut off
        view = self._block[: -(-self._filled // mmap.PAGESIZE) * mmap.PAGESIZE].data
        self._filled = 0
        while view:
            view = view[os.write(self._handle, view) :]

    def close(self, *, whole: bool) -> None:
        """Closes the file; one that is whole is on the disk after this."""
        try:
            if whole:
                self._flush()
                os.ftruncate(self._handle, self._size)
                os.fsync(self._handle)
        finally:
            os.close(self._handle)

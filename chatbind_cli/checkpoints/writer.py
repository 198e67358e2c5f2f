"""Writes safetensors files front to back, in pieces, and plans how tensors fall into shards.

The header goes first, since every size is known beforehand; then the data, piece by piece, so
that memory holds one piece and not a shard.

Tens of gigabytes that go through the page cache push everything else out of it, and finding room
for them costs a third more of the processor than all sums and hashes. So a large file is written by
direct I/O, in large aligned blocks, where the system and the file system know that.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory

from chatbind_cli.checkpoints.tensor_file import SAFETENSORS_DTYPES, TensorInfo
from chatbind_cli.errors import WeightsError

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
DEFAULT_SHARD_BYTES = 4 << 30
_LARGE_BYTES = 256 << 20
_BLOCK_BYTES = 8 << 20
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


def plan_shards(
    tensors: Mapping[str, TensorInfo], max_bytes: int = DEFAULT_SHARD_BYTES
) -> StateDictSplit:
    """Cuts tensors, in their order, into files of at most `max_bytes` (or one larger tensor)."""
    return split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda info: info.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )


def index_of(shards: StateDictSplit) -> str:
    """The content of `model.safetensors.index.json` for these shards."""
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    return json.dumps(index, indent=2) + "\n"


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
        """Takes the room for all of the file and writes the header."""
        with self._one_line():
            self._file = _OutputFile(self.path, 8 + len(self._header) + self._expected)
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
            self._file.close(sync=kind is None)
        if kind is None and self._written != self._expected:
            raise ValueError(f"{self._written} bytes written, {self._expected} in the header")


def bytes_of(piece: torch.Tensor) -> memoryview:
    """The bytes of a tensor as they stand in memory (little-endian machines only, like torch)."""
    flat = piece.detach().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors that are in memory already as one safetensors file."""
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with SafetensorsWriter(path, infos) as writer:
        for name in writer.order:
            writer.append(tensors[name])


class _OutputFile:
    """A file of known size, written front to back in blocks; a large one around the page cache.

    Args:
        path: is created, or written anew.
        size: how many bytes it will have; the room for them is taken at once, so that a full disk
            is noticed at once.

    Raises:
        OSError: it cannot be made, or there is no room for it.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._size = size
        self._handle = _open_direct(path) if size >= _LARGE_BYTES else os.open(path, _FLAGS, 0o666)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._handle, 0, size)
        except OSError as error:
            # Some file systems cannot do it; then the room is taken as the data come.
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                os.close(self._handle)
                raise
        # Pages of their own, because direct I/O wants aligned memory.
        self._block = np.frombuffer(mmap.mmap(-1, _BLOCK_BYTES), dtype=np.uint8)
        self._filled = 0

    def write(self, data: bytes | memoryview) -> None:
        """Writes the next bytes."""
        left = np.frombuffer(data, dtype=np.uint8)
        while left.size:
            count = min(left.size, self._block.size - self._filled)
            self._block[self._filled : self._filled + count] = left[:count]
            left = left[count:]
            self._filled += count
            if self._filled == self._block.size:
                self._flush()

    def _flush(self) -> None:
        # Direct I/O wants whole pages, too; what is too much at the end is cut off.
        view = self._block[: -(-self._filled // mmap.PAGESIZE) * mmap.PAGESIZE].data
        self._filled = 0
        while view:
            view = view[os.write(self._handle, view) :]

    def close(self, *, sync: bool) -> None:
        """Closes the file; `sync`: it is whole and has to be on the disk after this."""
        try:
            if sync:
                self._flush()
                os.ftruncate(self._handle, self._size)
                os.fsync(self._handle)
        finally:
            os.close(self._handle)


def _open_direct(path: Path) -> int:
    """Opens a file for direct I/O, or as any other where the file system does not know that."""
    try:
        return os.open(path, _FLAGS | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, _FLAGS, 0o666)

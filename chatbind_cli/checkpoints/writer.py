"""Writes safetensors files front to back, in pieces, and plans how tensors fall into shards.

The header goes first, since every size is known beforehand; then the data, piece by piece, so
that memory holds one piece and not a shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory

from chatbind_cli.checkpoints.tensor_file import SAFETENSORS_DTYPES, TensorInfo
from chatbind_cli.errors import WeightsError

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
DEFAULT_SHARD_BYTES = 4 << 30
_FLUSH_EVERY_BYTES = 64 << 20


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
        """Creates the file and writes the header."""
        with self._one_line():
            self._file = self.path.open("wb")
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
        before = self._written
        self._written += len(data)
        if self._written // _FLUSH_EVERY_BYTES != before // _FLUSH_EVERY_BYTES:
            self._leave_the_cache()
        return data

    def _leave_the_cache(self) -> None:
        """Has the kernel write what is there, and forget what it has written.

        A model of many gigabytes would push all else out of the page cache.
        """
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

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
        with self._one_line(), self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
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

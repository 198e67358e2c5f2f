"""Writes safetensors files front to back, in pieces, and plans how tensors fall into shards.

The header goes first, since every size is known beforehand; then the data, piece by piece, so
that memory holds one piece and not a shard. Knows nothing of where the data come from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from chatbind_cli.errors import WeightsError
from chatbind_cli.weights.output_file import OutputFile
from chatbind_cli.weights.tensor_file import SAFETENSORS_DTYPES, TensorInfo

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
DEFAULT_SHARD_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file and the tensors that go into it, in order."""

    file: str
    tensors: tuple[str, ...]


def plan_shards(
    tensors: Mapping[str, TensorInfo],
    max_bytes: int = DEFAULT_SHARD_BYTES,
    *,
    stem: str = "model",
) -> list[Shard]:
    """Cuts tensors, kept in order, into files of at most `max_bytes` (or one larger tensor)."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, info in tensors.items():
        if groups[-1] and size + info.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += info.nbytes
    if len(groups) == 1:
        return [Shard(f"{stem}.safetensors", tuple(groups[0]))]
    return [
        Shard(f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    ]


def index_of(shards: Sequence[Shard], tensors: Mapping[str, TensorInfo]) -> dict[str, object]:
    """The content of `model.safetensors.index.json` for these shards."""
    return {
        "metadata": {"total_size": sum(info.nbytes for info in tensors.values())},
        "weight_map": {name: shard.file for shard in shards for name in sorted(shard.tensors)},
    }


class SafetensorsWriter:
    """A safetensors file in the making. A context manager; the file is synced when it is whole.

    Args:
        path: the file to create.
        tensors: every tensor that will be written, in the order in which they will come.
        metadata: text that goes into the header.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        # The format wants data aligned to their element size: wide elements go first, else in
        # the order given. Python's sort is stable.
        self.order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
        self._expected = sum(info.nbytes for info in tensors.values())
        self._written = 0
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
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
        """Writes the header."""
        try:
            self._file = OutputFile(self.path, 8 + len(self._header) + self._expected)
        except OSError as error:
            raise self._cannot(error) from error
        self._write(len(self._header).to_bytes(8, "little") + self._header)
        return self

    def append(self, piece: torch.Tensor) -> memoryview:
        """Writes the next piece of the tensor whose turn it is, in `order`.

        Returns:
            The bytes that were written (for hashing), valid while `piece` is.
        """
        data = bytes_of(piece)
        self._write(data)
        self._written += len(data)
        return data

    def _cannot(self, error: OSError) -> WeightsError:
        return WeightsError(
            f"cannot be written ({error.strerror})",
            where=str(self.path),
            hint="make room and run the same command again: it goes on where it stopped",
        )

    def _write(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise self._cannot(error) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Syncs and closes; checks that every byte the header promised has come."""
        try:
            self._file.close(sync=kind is None)
        except OSError as error_at_the_end:
            raise self._cannot(error_at_the_end) from error_at_the_end
        if kind is None and self._written != self._expected:
            raise ValueError(f"{self._written} bytes written, {self._expected} in the header")


def bytes_of(piece: torch.Tensor) -> memoryview:
    """The bytes of a tensor as they stand in memory (little-endian machines only, like torch)."""
    flat = piece.detach().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    names: Iterable[str] | None = None,
) -> None:
    """Writes tensors that are in memory already as one safetensors file."""
    chosen = {name: tensors[name] for name in (names or tensors)}
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in chosen.items()}
    with SafetensorsWriter(path, infos, metadata) as writer:
        for name in writer.order:
            writer.append(chosen[name])

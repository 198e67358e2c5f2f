"""The elements at which base + delta, rounded, is not yet the target, and the target's value there.

A delta in half precision cannot express every target: where the base's value is much larger than
the target's, the step between neighbouring deltas is too coarse. `make-delta` writes those few
elements beside the delta, in files that other programs ignore, so that `apply-delta` gives the
target bit for bit. Layout: `<tensor>.index` (int32 or int64, rising) and `<tensor>.value`.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO

import torch

from chatbind_cli.weights.tensor_file import TensorFile, TensorInfo, open_tensor_file
from chatbind_cli.weights.writer import SafetensorsWriter, bytes_of

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 1 << 20


def differing(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Positions at which two 1-D tensors differ in any bit (so -0 is not 0, and NaN is NaN)."""
    bits = _BITS[found.dtype.itemsize]
    return (found.view(bits) != wanted.view(bits)).nonzero().view(-1)


class CorrectionSpool:
    """Collects the corrections of one shard on disk and writes them as one safetensors file.

    Args:
        path: the file to write in the end; two spools grow beside it until then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors: dict[str, TensorInfo] = {}
        self._spools = (path.with_suffix(".index-spool"), path.with_suffix(".value-spool"))
        self._files: tuple[IO[bytes], IO[bytes]] | None = None

    def add(self, name: str, index: torch.Tensor, value: torch.Tensor, numel: int) -> None:
        """Adds corrections of a tensor of `numel` elements; indices rise from call to call."""
        if not index.numel():
            return
        if self._files is None:
            self._files = (self._spools[0].open("wb"), self._spools[1].open("wb"))
        wide = torch.int64 if numel > torch.iinfo(torch.int32).max else torch.int32
        self._files[0].write(bytes_of(index.to(wide)))
        self._files[1].write(bytes_of(value))
        for suffix, piece, dtype in (("index", index, wide), ("value", value, value.dtype)):
            key = f"{name}.{suffix}"
            before = self._tensors[key].numel if key in self._tensors else 0
            self._tensors[key] = TensorInfo((before + piece.numel(),), dtype)

    @property
    def count(self) -> int:
        """Number of corrections so far."""
        return sum(info.numel for key, info in self._tensors.items() if key.endswith(".value"))

    def finish(self) -> bool:
        """Writes the file; returns whether there was anything to write."""
        if self._files is None:
            return False
        for file in self._files:
            file.close()
        begin: dict[str, int] = {}
        offsets = {"index": 0, "value": 0}
        for key, info in self._tensors.items():
            kind = key.rpartition(".")[2]
            begin[key] = offsets[kind]
            offsets[kind] += info.nbytes
        with SafetensorsWriter(self.path, self._tensors) as writer:
            for key in writer.order:
                self._copy(key, begin[key], writer)
        for spool in self._spools:
            spool.unlink()
        return True

    def _copy(self, key: str, begin: int, writer: SafetensorsWriter) -> None:
        spool = self._spools[0] if key.endswith(".index") else self._spools[1]
        left = self._tensors[key].nbytes
        with spool.open("rb") as file:
            file.seek(begin)
            while left:
                data = bytearray(file.read(min(left, 16 << 20)))
                writer.append(torch.frombuffer(data, dtype=torch.uint8))
                left -= len(data)


class Corrections:
    """The corrections that come with a delta, put in as the target streams by.

    Args:
        files: the correction files of the delta; none for a delta of the published kind.
    """

    def __init__(self, files: list[Path]) -> None:
        self._file_of: dict[str, TensorFile] = {}
        for path in files:
            file = open_tensor_file(path)
            for key in file.tensors:
                if key.endswith(".value"):
                    self._file_of[key.removesuffix(".value")] = file
        self._next: dict[str, int] = {}

    def put(self, name: str, start: int, piece: torch.Tensor) -> None:
        """Corrects a piece in place; the pieces of a tensor come in order.

        Args:
            name: the tensor.
            start: position of the piece's first element in the tensor.
            piece: 1-D.
        """
        file = self._file_of.get(name)
        if file is None:
            return
        count = file.tensors[f"{name}.value"].numel
        stop = start + piece.numel()
        while (at := self._next.get(name, 0)) < count:
            index = file.read_flat(f"{name}.index", at, min(at + _BLOCK, count)).to(torch.int64)
            here = int(torch.searchsorted(index, stop))
            if here:
                values = file.read_flat(f"{name}.value", at, at + here)
                piece[index[:here] - start] = values
                self._next[name] = at + here
            if here < index.numel():
                return

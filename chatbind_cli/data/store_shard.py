"""Shards of an embedding store: one safetensors file with vectors and their index columns.

Tensors of a shard of n rows: `embeddings` [n, dim]; `content_sha256` uint8 [n, 32]; `names`, the
UTF-8 names one after the other; `name_end` int32 [n], where each ends; `name_hash` int64 [n];
`kind` int16 [n], an index into the metadata's list of [modality, preprocessing]. About 46 bytes a
row plus its name. Shards never change; a partial last one is replaced by a longer one.
Knows nothing of journals and of who may write.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from chatbind_cli.errors import StoreError
from chatbind_cli.files import replace_file

_SHA256_BYTES = 32


@dataclass(frozen=True, slots=True)
class Entry:
    """What a row is: everything but its vector."""

    name: str
    modality: str
    content_sha256: str
    fingerprint: str

    @property
    def name_hash(self) -> int:
        """64 bits of (modality, name)."""
        return name_hash(self.modality, self.name)

    @property
    def content_hash(self) -> int:
        """64 bits of the content's hash."""
        return content_hash(self.content_sha256)


def name_hash(modality: str, name: str) -> int:
    """Returns a signed 64-bit hash that is the same in every process."""
    digest = hashlib.blake2b(text_bytes(f"{modality}\0{name}"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def content_hash(sha256: str) -> int:
    """Returns the first 64 bits of a hexadecimal SHA-256 as a signed number."""
    return int.from_bytes(bytes.fromhex(sha256)[:8], "little", signed=True)


def text_bytes(text: str) -> bytes:
    """Returns UTF-8, and the very bytes of a file name that is not UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def bytes_text(data: bytes) -> str:
    """Undoes `text_bytes`."""
    return data.decode("utf-8", "surrogateescape")


class Shard:
    """A shard file, memory-mapped.

    Args:
        path: the file.
        dim: length of its vectors.

    Raises:
        StoreError: it cannot be read, or is no shard of such vectors.
    """

    def __init__(self, path: Path, dim: int) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                kinds = json.loads((file.metadata() or {})["kinds"])
            self.kinds = [(str(modality), str(made)) for modality, made in kinds]
            self.embeddings = columns["embeddings"]
            self._names = columns["names"].numpy()
            self._name_end = columns["name_end"].numpy()
            self._kind = columns["kind"].numpy()
            self._sha256 = columns["content_sha256"].numpy()
            self.name_hashes: NDArray[np.int64] = columns["name_hash"].numpy()
        except (
            SafetensorError,
            OSError,
            KeyError,
            ValueError,
            TypeError,
            RecursionError,
        ) as error:
            raise StoreError(
                f"this shard is broken: {error}",
                where=str(path),
                hint="delete it and encode again: only its own rows are lost",
            ) from error
        if self.embeddings.shape != (len(self), dim):
            raise StoreError(f"holds no vectors of {dim} numbers", where=str(path))

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.name_hashes)

    @property
    def content_hashes(self) -> NDArray[np.int64]:
        """64 bits of every row's content hash, [n]."""
        return np.ascontiguousarray(self._sha256[:, :8]).view("<i8")[:, 0]

    def entry(self, position: int) -> Entry:
        """Returns what the row at a position is."""
        start = int(self._name_end[position - 1]) if position else 0
        modality, fingerprint = self.kinds[int(self._kind[position])]
        return Entry(
            name=bytes_text(bytes(self._names[start : int(self._name_end[position])])),
            modality=modality,
            content_sha256=bytes(self._sha256[position]).hex(),
            fingerprint=fingerprint,
        )

    def entries(self) -> Iterator[Entry]:
        """Yields what the rows are, in order."""
        return map(self.entry, range(len(self)))


def write_shard(path: Path, entries: Sequence[Entry], embeddings: torch.Tensor) -> None:
    """Writes a shard, whole or not at all.

    Args:
        path: the file; one that exists is replaced.
        entries: what the rows are.
        embeddings: [n, dim], in the dtype of the store.
    """
    kinds = sorted({(entry.modality, entry.fingerprint) for entry in entries})
    numbers = {kind: number for number, kind in enumerate(kinds)}
    names = [text_bytes(entry.name) for entry in entries]
    sha256 = b"".join(bytes.fromhex(entry.content_sha256) for entry in entries)
    tensors = {
        "embeddings": embeddings.contiguous(),
        "content_sha256": _column(np.frombuffer(sha256, np.uint8).reshape(-1, _SHA256_BYTES)),
        "name_hash": _column(np.array([entry.name_hash for entry in entries], np.int64)),
        "name_end": _column(np.cumsum([len(name) for name in names], dtype=np.int32)),
        "names": _column(np.frombuffer(b"".join(names), np.uint8)),
        "kind": _column(np.array([numbers[e.modality, e.fingerprint] for e in entries], np.int16)),
    }
    with replace_file(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"kinds": json.dumps(kinds)})
        except SafetensorError as error:
            raise StoreError(f"cannot be written ({error})", where=str(path)) from error


class HashIndex:
    """Finds the rows of a hash among those of all shards: 16 bytes of memory a row.

    Args:
        columns: the hash column of each shard, in the shards' order.
    """

    def __init__(self, columns: Sequence[NDArray[np.int64]]) -> None:
        hashes = np.concatenate([np.empty(0, np.int64), *columns])
        self._rows = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._rows]

    def newest_first(self, wanted: int) -> Iterator[int]:
        """Yields the numbers of the rows with this hash, the newest first."""
        start, end = (
            int(np.searchsorted(self._hashes, wanted, side)) for side in ("left", "right")
        )
        return map(int, reversed(self._rows[start:end]))


def _column(values: NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(values.copy())

"""The journal of an embedding store: rows that are not in a shard yet, one appended after another.

A row is handed to the operating system in one write, with its length and checksum, so a process
that is killed loses at most the row it was writing. The head of the file says which shard the
rows are for and how many rows that shard had then: once the shard has more, the journal is spent.
Knows nothing of safetensors.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from chatbind_cli.data.store_shard import Entry, bytes_text, text_bytes

_HEAD = struct.Struct("<8sII")  # magic, shard number, rows the shard had
_MAGIC = b"CBEJRNL1"
_FRAME = struct.Struct("<II")  # length and CRC-32 of the payload
_TEXT = struct.Struct("<I")


@dataclass(frozen=True)
class JournalContent:
    """What a journal file holds.

    Attributes:
        shard: number of the shard that the rows will be appended to.
        base: rows that the shard had when the journal was begun.
        entries: what the rows are.
        embeddings: their vectors, one [dim] tensor each.
        size: bytes of the file that are whole rows.
    """

    shard: int
    base: int
    entries: list[Entry]
    embeddings: list[torch.Tensor]
    size: int


def read_journal(path: Path, dim: int, dtype: torch.dtype) -> JournalContent | None:
    """Returns the whole rows of a journal, None where there is no journal or not even its head.

    What follows the first row that is cut off or damaged is left out.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(data) < _HEAD.size:
        return None
    magic, shard, base = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        return None
    content = JournalContent(shard, base, [], [], _HEAD.size)
    size = _HEAD.size
    for payload in _payloads(data):
        row = _decode(payload, dim, dtype)
        if row is None:
            break
        content.entries.append(row[0])
        content.embeddings.append(row[1])
        size += _FRAME.size + len(payload)
    return JournalContent(shard, base, content.entries, content.embeddings, size)


class JournalWriter:
    """Appends rows to a journal file.

    Args:
        path: the file.
        shard: see `JournalContent`.
        base: see `JournalContent`.
        keep: bytes of an existing journal to go on after; 0 starts a new one.
    """

    def __init__(self, path: Path, *, shard: int, base: int, keep: int = 0) -> None:
        self.path = path
        if keep:
            os.truncate(path, keep)
        else:
            path.unlink(missing_ok=True)
        self._file: BinaryIO = path.open("ab", buffering=0)
        if not keep:
            self._file.write(_HEAD.pack(_MAGIC, shard, base))

    def append(self, entry: Entry, embedding: torch.Tensor) -> None:
        """Hands one row to the operating system."""
        payload = _encode(entry, embedding)
        frame = _FRAME.pack(len(payload), zlib.crc32(payload)) + payload
        start = self._file.tell()
        try:
            written = self._file.write(frame)
            if written != len(frame):  # a full disk takes part of it before it refuses
                raise OSError(f"{self.path}: no space left for an embedding")
        except OSError:
            os.truncate(self.path, start)
            raise

    def close(self) -> None:
        """Closes the file, which stays."""
        self._file.close()

    def discard(self) -> None:
        """Deletes the file: its rows are in a shard now."""
        self.close()
        self.path.unlink()


def _payloads(data: bytes) -> Iterator[bytes]:
    position = _HEAD.size
    while position + _FRAME.size <= len(data):
        length, checksum = _FRAME.unpack_from(data, position)
        start = position + _FRAME.size
        payload = data[start : start + length]
        if len(payload) < length or zlib.crc32(payload) != checksum:
            return
        yield payload
        position = start + length


def _encode(entry: Entry, embedding: torch.Tensor) -> bytes:
    parts = [bytes.fromhex(entry.content_sha256)]
    for text in (entry.modality, entry.fingerprint, entry.name):
        encoded = text_bytes(text)
        parts += [_TEXT.pack(len(encoded)), encoded]
    return b"".join([*parts, embedding.contiguous().numpy().tobytes()])


def _decode(payload: bytes, dim: int, dtype: torch.dtype) -> tuple[Entry, torch.Tensor] | None:
    position = 32
    texts = []
    for _ in range(3):
        (length,) = _TEXT.unpack_from(payload, position)
        position += _TEXT.size + length
        texts.append(bytes_text(payload[position - length : position]))
    if len(payload) - position != dim * dtype.itemsize:
        return None
    modality, fingerprint, name = texts
    entry = Entry(name, modality, payload[:32].hex(), fingerprint)
    return entry, torch.frombuffer(bytearray(payload[position:]), dtype=dtype)

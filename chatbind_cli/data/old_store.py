"""Embedding stores of the form before SQLite: `store.json` and shards in safetensors form.

They are read for the last time here, to be converted. Rows that a killed writer had left in a
journal beside the shards are not: their media are encoded again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

from chatbind_cli.data.database import Row, StoreMeta, create
from chatbind_cli.errors import StoreError, reason

_META = "store.json"
_FORMAT = "chatbind-embeddings-1"
_LARGEST_META = 1 << 20


def is_old(folder: Path) -> bool:
    """Whether a folder holds a store of the old form."""
    try:
        with (folder / _META).open("rb") as file:
            return bool(json.loads(file.read(_LARGEST_META))["format"] == _FORMAT)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def convert(folder: Path, path: Path) -> None:
    """Makes a store's file of the shards beside it, and removes them.

    Raises:
        StoreError: they cannot be read.
    """
    shards = sorted(folder.glob("shard-*.safetensors"))
    try:
        meta = StoreMeta.of(json.loads((folder / _META).read_bytes()))
        create(path, meta, (row for shard in shards for row in _rows(shard)))
        for part in (*shards, *folder.glob("journal.bin"), folder / _META):
            part.unlink()
    except StoreError:
        raise
    except Exception as error:  # whatever a library makes of a broken file
        raise StoreError(
            f"cannot be converted: {reason(error)}", where=str(folder), hint="encode it anew"
        ) from error


def _rows(shard: Path) -> Iterator[Row]:
    """What a shard holds: columns as tensors, and texts in one block one after the other."""
    with safe_open(shard, framework="np") as file:
        names = file.get_tensor("names").tobytes()
        ends = file.get_tensor("name_end").tolist()
        kinds = json.loads(file.metadata()["kinds"])
        numbers = file.get_tensor("kind").tolist()
        hashes = file.get_tensor("content_sha256")
        embeddings = file.get_tensor("embeddings")
    for start, end, number, sha256, row in zip(
        [0, *ends], ends, numbers, hashes, embeddings, strict=False
    ):
        modality, preprocessing = kinds[number]
        name = names[start:end].decode("utf-8", "backslashreplace")
        yield name, modality, preprocessing, sha256.tobytes(), row.tobytes()

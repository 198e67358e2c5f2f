"""What an embedding store says about itself, and the lock that keeps writers apart.

Knows nothing of rows.
"""

from __future__ import annotations

import fcntl
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

import torch

from chatbind_cli.errors import StoreError
from chatbind_cli.files import replace_file
from chatbind_cli.folders import note_made, refuse_foreign

META_NAME = "store.json"
JOURNAL_NAME = "journal.bin"
MADE_BY = "encode"  # on a store's record, whoever fills it
DTYPES = {"float16": torch.float16, "float32": torch.float32}
_FORMAT = "chatbind-embeddings-1"
_LOCK_NAME = "writer.lock"


@dataclass(frozen=True, kw_only=True)
class StoreMeta:
    """What a store says about itself in `store.json`.

    A store that was made before these were noted does not say `encoder_dtype` and
    `media_options`.
    """

    encoder_name: str
    encoder_sha256: str
    dim: int
    dtype: str  # float16 or float32
    normalized: bool = False  # embeddings are kept as published, with their scale
    format: str = _FORMAT
    encoder_dtype: str | None = None  # in which the encoder worked
    media_options: dict[str, Any] | None = None  # fields of `MediaOptions` that all rows share


def take_lock(folder: Path) -> IO[bytes]:
    """Returns the open lock file of a store, or of an empty folder that becomes one.

    The lock ends when the file is closed or its process dies.

    Raises:
        ChatBindError: another process has it, or the folder holds something else.
    """
    if (folder / META_NAME).exists():
        read_meta(folder)
    else:
        if folder.exists() and not folder.is_dir():
            raise StoreError("is a file", where=str(folder), hint="name a folder")
        refuse_foreign(folder, made_by=MADE_BY)
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / _LOCK_NAME).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        busy = isinstance(error, BlockingIOError)
        what = "another process is writing to this store" if busy else f"cannot be locked: {error}"
        raise StoreError(what, where=str(folder)) from error
    return file


def create_meta(
    folder: Path,
    name: str,
    sha256: str | None,
    dim: int | None,
    dtype: str | None,
    encoder_dtype: str | None = None,
    media_options: dict[str, Any] | None = None,
) -> None:
    """Writes the `store.json` of a new store.

    Raises:
        StoreError: the encoder is not told, or the dtype is none that a store holds.
    """
    if sha256 is None or dim is None:
        raise StoreError("is no store yet, and a new one needs an encoder", where=str(folder))
    if dtype is not None and dtype not in DTYPES:
        raise StoreError(f"cannot hold {dtype}, only {' or '.join(DTYPES)}", where=str(folder))
    note_made(folder, (META_NAME, JOURNAL_NAME, _LOCK_NAME), made_by=MADE_BY)
    meta = StoreMeta(
        encoder_name=name,
        encoder_sha256=sha256,
        dim=dim,
        dtype=dtype or "float16",
        encoder_dtype=encoder_dtype,
        media_options=media_options,
    )
    write_meta(folder, meta)


def share_options(folder: Path, meta: StoreMeta, options: dict[str, Any]) -> StoreMeta:
    """Leaves in `store.json` only those media options that rows to come have, too."""
    had = meta.media_options
    if had is None:
        return meta  # nobody knows what its rows have in common
    shared = {key: value for key, value in had.items() if options.get(key, value) == value}
    if shared != had:
        meta = replace(meta, media_options=shared)
        write_meta(folder, meta)
    return meta


def write_meta(folder: Path, meta: StoreMeta) -> None:
    """Writes `store.json`, whole or not at all."""
    with replace_file(folder / META_NAME) as path:
        path.write_text(json.dumps(asdict(meta), indent=1) + "\n", encoding="utf-8")


def read_meta(folder: Path) -> StoreMeta:
    """Returns what a store says about itself.

    Raises:
        StoreError: there is no store, or not one that this version reads.
    """
    try:
        values = json.loads((folder / META_NAME).read_text(encoding="utf-8"))
        late = {"encoder_dtype": None, "media_options": None}
        values = {**late, **values}
        meta = StoreMeta(**{field.name: values[field.name] for field in fields(StoreMeta)})
        if not isinstance(meta.media_options, dict | None):
            raise TypeError("media_options is no object")
    except FileNotFoundError as error:
        raise StoreError(
            "holds no embedding store", where=str(folder), hint="make one: chatbind encode --store"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(f"cannot be read: {error}", where=str(folder / META_NAME)) from error
    if meta.format != _FORMAT or meta.dtype not in DTYPES:
        raise StoreError(
            f"is of a format this version does not know: {meta.format}", where=str(folder)
        )
    return meta

"""The embedding store: media encoded once, read by training as often as it likes.

A folder with one SQLite file. A row is known by name (as training records have it), modality and
preprocessing, and found by its content's hash, too. One process writes; any number read at the
same time, and see what has been committed.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Literal

import torch

from chatbind_cli.data.database import (
    DTYPES,
    FILE_NAME,
    INSERT,
    JOURNAL_NAME,
    StoreMeta,
    connect,
    create,
    unusable,
    write_meta,
)
from chatbind_cli.errors import StoreError
from chatbind_cli.files import lock_file
from chatbind_cli.folders import clear_temporaries, note_made, refuse_foreign, remove_made
from chatbind_cli.jsonl import legible

_MADE_BY = "encode"  # on a store's record, whoever fills it
_LOCK_NAME = "writer.lock"
_SECONDS_PER_COMMIT = 1.0  # what a kill loses

_BY_NAME = (
    "SELECT sha256, embedding FROM embeddings WHERE name = ? AND modality = ? "
    "AND preprocessing = coalesce(?, preprocessing) ORDER BY id DESC LIMIT 1"
)
_MANY = (
    "SELECT name, embedding FROM embeddings WHERE name IN (SELECT value FROM json_each(?)) "
    "AND modality = ? AND preprocessing = coalesce(?, preprocessing) ORDER BY id"
)
_HELD = (
    "SELECT DISTINCT name FROM embeddings WHERE name IN (SELECT value FROM json_each(?)) "
    "AND modality = ? AND preprocessing = coalesce(?, preprocessing)"
)
_BY_CONTENT = (
    "SELECT embedding FROM embeddings WHERE sha256 = ? AND modality = ? AND preprocessing = ? "
    "LIMIT 1"
)


class EmbeddingStore:
    """Embeddings on disk. Made by `EmbeddingStore.open`, let go by `close` or a `with` block."""

    def __init__(self, folder: Path, lock: IO[bytes] | None, made: Mapping[str, Any]) -> None:
        self.folder = folder
        self._path = folder / FILE_NAME
        self._lock = lock
        self._begun = 0.0
        self._connect()
        try:
            self._check(made)
            if lock is not None and made.get("media_options") is not None:
                self._share_options(made["media_options"])
        except BaseException:
            self._connection.close()
            raise

    @classmethod
    def open(cls, folder: str | Path, mode: Literal["r", "a"] = "r", **made: Any) -> EmbeddingStore:
        """Opens a store to read ("r") or to write ("a"; makes a new one where there is none).

        Args:
            folder: the store.
            mode: "r" or "a".
            made: fields of `StoreMeta`. What is given and not None must be what the store says, if
                it says anything, but for the encoder's name; `media_options` are those of rows
                that will be added. A new store needs `encoder_sha256` and `dim`.

        Raises:
            StoreError: there is no store, it is broken, or it was made by another encoder.
            ChatBindError: another process is writing to it, or the folder holds something else.
        """
        folder = Path(folder)
        if mode == "r":
            _refuse_absent(folder)
            return cls(folder, None, made)
        _refuse_other(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as unless_open:
            lock = unless_open.enter_context((folder / _LOCK_NAME).open("ab"))
            lock_file(lock.fileno(), folder)
            _make_ready(folder, made)
            store = cls(folder, lock, made)
            unless_open.pop_all()
        return store

    def __len__(self) -> int:
        """The number of rows."""
        [(rows,)] = self._run("SELECT count(*) FROM embeddings")
        return int(rows)

    def kinds(self) -> set[tuple[str, str]]:
        """Which (modality, preprocessing) its rows have."""
        return set(self._run("SELECT DISTINCT modality, preprocessing FROM embeddings"))

    def get(
        self, modality: str, *, name: str, fingerprint: str | None = None
    ) -> torch.Tensor | None:
        """Returns an embedding as published (not normalised), float32 [dim], or None.

        The name is the path as a training record gives it; without the fingerprint of a
        preprocessing (`MediaOptions.fingerprint`) the newest row counts.

        Raises:
            StoreError: the store is broken.
        """
        row = self.find(modality, name, fingerprint)
        return None if row is None else row[1]

    def find(
        self, modality: str, name: str, fingerprint: str | None = None
    ) -> tuple[str, torch.Tensor] | None:
        """The same, with the SHA-256 of the medium's content before it."""
        found = self._run(_BY_NAME, (_as_text(name), modality, fingerprint))
        return (found[0][0].hex(), self._vectors([found[0][1]])[0]) if found else None

    def get_many(
        self, modality: str, names: Sequence[str], fingerprint: str | None = None
    ) -> dict[str, torch.Tensor]:
        """What `get` finds for many names, asked for at once; those without a row are left out."""
        spelled = {_as_text(name): name for name in names}
        asked = (json.dumps(list(spelled)), modality, fingerprint)
        found = dict(self._run(_MANY, asked))  # the newest of a name comes last
        vectors = self._vectors(list(found.values()))
        return dict(zip(map(spelled.__getitem__, found), vectors, strict=True))

    def held(self, modality: str, names: Sequence[str], fingerprint: str | None = None) -> set[str]:
        """Those of many names for which `get` would find an embedding; none is read."""
        spelled = {_as_text(name): name for name in names}
        asked = (json.dumps(list(spelled)), modality, fingerprint)
        return {spelled[name] for (name,) in self._run(_HELD, asked)}

    def recall(self, modality: str, content_sha256: str, fingerprint: str) -> torch.Tensor | None:
        """Returns the embedding of the same content under whatever name, if there is one."""
        content = bytes.fromhex(content_sha256)
        found = self._run(_BY_CONTENT, (content, modality, fingerprint))
        return self._vectors([found[0][0]])[0] if found else None

    def add(
        self,
        name: str,
        modality: str,
        content_sha256: str,
        fingerprint: str,
        embedding: torch.Tensor,
    ) -> None:
        """Adds a row, in place of one of the same name, modality and preprocessing.

        It is committed with others, at the latest when a row is added a second later, or on
        closing. The embedding, [dim], is as published, not normalised.

        Raises:
            StoreError: the store is open for reading only or cannot be written, or the embedding
                is not finite in the store's dtype or of another length.
        """
        if self._lock is None:
            raise StoreError("is open for reading only", where=str(self.folder))
        vector = embedding.detach().to("cpu", DTYPES[self.meta.dtype])
        problem = None
        if vector.shape != (self.meta.dim,):
            problem = f"of {list(vector.shape)}; the store's are [{self.meta.dim}]"
        elif not torch.isfinite(vector).all():
            problem = f"that is not finite in {self.meta.dtype}"
        if problem is not None:
            raise StoreError(f"has an embedding {problem}", where=name)
        content, numbers = bytes.fromhex(content_sha256), vector.contiguous().numpy().tobytes()
        with self._threads:
            if not self._connection.in_transaction:
                self._run("BEGIN IMMEDIATE")
                self._begun = time.monotonic()
            self._run(INSERT, (_as_text(name), modality, fingerprint, content, numbers))
            if time.monotonic() - self._begun > _SECONDS_PER_COMMIT:
                self._run("COMMIT")

    def close(self) -> None:
        """Commits what was added and lets go of the store."""
        try:
            with self._threads, closing(self._connection):
                if self._connection.in_transaction:
                    self._run("COMMIT")
        finally:
            if self._lock is not None:
                self._lock.close()

    def __enter__(self) -> EmbeddingStore:
        """Returns itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the store."""
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Lets the worker processes of a data loader open the store anew, for reading."""
        return EmbeddingStore.open, (self.folder,)

    def _connect(self) -> None:
        self._connection, self.meta = connect(self._path, write=self._lock is not None)
        self._process = os.getpid()
        self._threads = threading.RLock()  # decoding threads look rows up while one adds

    def _run(self, statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
        if self._process != os.getpid():
            # a data loader has forked, and a connection must not be used by two processes: the
            # parent's is kept from being closed here
            self._of_parent = self._connection
            self._connect()
        try:
            with self._threads:
                return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise unusable(self._path, error) from error

    def _vectors(self, rows: Sequence[Any]) -> Sequence[torch.Tensor]:
        """The embeddings of rows, float32 [dim] each."""
        dtype, dim = DTYPES[self.meta.dtype], self.meta.dim
        if not all(isinstance(row, bytes) and len(row) == dim * dtype.itemsize for row in rows):
            raise StoreError(
                f"holds a row that is not {dim} numbers of {self.meta.dtype}",
                where=str(self._path),
            )
        if not rows:
            return ()
        return torch.frombuffer(bytearray().join(rows), dtype=dtype).float().view(-1, dim).unbind()

    def _check(self, made: Mapping[str, Any]) -> None:
        for field in ("encoder_sha256", "dim", "dtype", "encoder_dtype"):
            ours, wanted = getattr(self.meta, field), made.get(field)
            if None not in (ours, wanted) and wanted != ours:
                what = field.removesuffix("_sha256").replace("_", " ")
                raise StoreError(
                    f"was made with {what} {ours}, not {wanted}",
                    where=str(self.folder),
                    hint="choose another store, or --overwrite to start it anew",
                )

    def _share_options(self, options: dict[str, Any]) -> None:
        """Leaves in what the store says only those media options that rows to come have, too."""
        had = self.meta.media_options
        if had is None:
            return  # nobody knows what its rows have in common
        shared = {key: value for key, value in had.items() if options.get(key, value) == value}
        if shared != had:
            self.meta = replace(self.meta, media_options=shared)
            write_meta(self._connection, self.meta)


def clear_store(folder: Path) -> None:
    """Deletes the store in a folder, if there is one.

    Raises:
        ChatBindError: another process is writing to it, or something else is in the folder.
    """
    refuse_foreign(folder, made_by=_MADE_BY)
    if folder.is_dir() and any(folder.iterdir()):
        with (folder / _LOCK_NAME).open("ab") as lock:
            lock_file(lock.fileno(), folder)
            remove_made(folder)


def _refuse_absent(folder: Path) -> None:
    if (folder / FILE_NAME).exists():
        return
    raise StoreError(
        "holds no embedding store", where=str(folder), hint="make one: chatbind encode --store"
    )


def _refuse_other(folder: Path) -> None:
    """Lets pass a store, and an empty folder that becomes one, before anything is written there."""
    if (folder / FILE_NAME).exists():
        connect(folder / FILE_NAME)[0].close()
    else:
        refuse_foreign(folder, made_by=_MADE_BY)


def _make_ready(folder: Path, made: Mapping[str, Any]) -> None:
    """Sees to it that a locked folder has a store's file: there before, or new."""
    path = folder / FILE_NAME
    there = path.exists()
    if not there:
        note_made(folder, (FILE_NAME, JOURNAL_NAME, _LOCK_NAME), made_by=_MADE_BY)
    clear_temporaries(folder)
    if there:
        return
    try:
        create(path, StoreMeta.of(made))
    except (ValueError, TypeError) as error:  # of a program: the commands say all there is to say
        raise StoreError(f"cannot be made: {error}", where=str(folder)) from error


def _as_text(name: str) -> str:
    """A name that a database takes: halves of characters are spelled out."""
    return name if name.isascii() else legible(name).encode("utf-8", "backslashreplace").decode()

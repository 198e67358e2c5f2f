"""Embeddings that outlast the run that made them, for every later run of the same encoder.

A store for each encoder and dtype, below one folder. Its rows are not named as records name media
but by the file (path, inode, size and time of change), so that an unchanged file is found without
being read, and a copy of it by its content's hash. Whatever a cache holds can be made again: if
something is wrong with it, work goes on without.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from chatbind_cli.console import note
from chatbind_cli.data.database import FILE_NAME
from chatbind_cli.data.encode import writable_store
from chatbind_cli.data.encoding import Encoded
from chatbind_cli.data.media_items import MediaItem
from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.encoders.encoder import Encoder
from chatbind_cli.errors import ChatBindError, MediaError, StoreError
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.root import MediaRoot

T = TypeVar("T")

# A file may change twice within one tick of its clock: a fresh one is known by its content alone.
_SETTLED_NS = 2_000_000_000
_SECONDS_PER_WRITE = 5.0
_PATIENCE_S = 5.0  # at the end, while other processes write
_MOST_WAITING = 20_000  # rows: 80 MB


def _file(root: MediaRoot, name: str) -> tuple[str, os.stat_result]:
    """Where a medium is, and what the disk says of it.

    `MediaRoot.find` follows every link on the way, which takes as long as all the rest. That it
    lets a file pass was seen to before, and nothing is read here.
    """
    if not root.prefix and ".." not in name and not name.startswith("/"):
        path = os.path.join(os.path.abspath(root.folder or ""), name)  # noqa: PTH100, PTH118
        with suppress(FileNotFoundError):
            return path, os.stat(path)  # noqa: PTH116
    found = root.find(name)
    return str(found), found.stat()


class EmbeddingCache:
    """Looks embeddings up, and keeps new ones. Let go by `close`, which writes the last of them.

    Several processes may use the same folder at once; one at a time writes.

    Args:
        folder: where the caches of all encoders are; None: nothing is found and nothing is kept.
        encoder: whose embeddings.
        options: how media become tensors.
    """

    def __init__(self, folder: Path | None, encoder: Encoder, options: MediaOptions) -> None:
        self._encoder = encoder
        self._options = options
        self._folder: Path | None = None
        self._store: EmbeddingStore | None = None
        self._names: dict[tuple[str | None, str], str] = {}
        self._waiting: list[tuple[str, Medium]] = []
        self._written = time.monotonic()
        if folder is None:
            return
        self._folder = folder / f"{encoder.sha256[:16]}-{encoder.dtype_name}"
        try:
            if (self._folder / FILE_NAME).exists():
                self._store = EmbeddingStore.open(
                    self._folder, encoder_sha256=encoder.sha256, dim=encoder.embedding_dim
                )
        except (ChatBindError, OSError) as error:
            self._give_up(error)

    def find(self, item: MediaItem) -> Encoded | None:
        """The embedding of an unchanged file that records name; None if its file is new here."""
        if self._folder is None or item.root is None or item.modality is None:
            return None
        with suppress(MediaError, OSError):  # told when the file is to be decoded
            path, stat = _file(item.root, item.medium.name)
            if time.time_ns() - stat.st_mtime_ns < _SETTLED_NS:
                return None
            name = f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {path}"
            made = self._options.fingerprint(item.modality)
            row = self._asked(lambda store: store.find(str(item.modality), name, made))
            if row is not None:
                return Encoded(item, replace(item.medium, sha256=row[0], embedding=row[1]))
            # of now: should the file change while it is read, nobody will find it by this name
            self._names[item.modality, item.name] = name
        return None

    def recall(self, modality: str, sha256: str) -> torch.Tensor | None:
        """The embedding of the same content in whatever file, if there is one."""
        made = self._options.fingerprint(modality)
        return self._asked(lambda store: store.recall(modality, sha256, made))

    def keep(self, result: Encoded) -> None:
        """Keeps what has become of an item that was not found."""
        if self._folder is None:
            return
        content = str(result.medium.sha256)
        name = self._names.pop((result.item.modality, result.item.name), content)
        self._waiting.append((name, result.medium))
        if time.monotonic() - self._written > _SECONDS_PER_WRITE:
            self._write()

    def close(self) -> None:
        """Writes what is not written yet, unless other processes write all the time."""
        end = time.monotonic() + _PATIENCE_S
        while self._waiting and (problem := self._write()) is not None:
            if time.monotonic() > end:
                self._give_up(problem)
            else:
                time.sleep(0.1)
        if self._store is not None:
            self._store.close()

    def _asked(self, ask: Callable[[EmbeddingStore], T | None]) -> T | None:
        store = self._store
        if store is None:
            return None
        try:
            return ask(store)
        except ChatBindError as error:
            self._give_up(error)
            return None

    def _write(self) -> Exception | None:
        """Writes what waits; if another process does so too, it waits on."""
        assert self._folder is not None
        self._written = time.monotonic()
        try:
            with writable_store(self._folder, self._encoder, self._options) as store:
                for name, medium in self._waiting:
                    assert medium.modality and medium.sha256 and medium.embedding is not None
                    made = self._options.fingerprint(medium.modality)
                    store.add(name, medium.modality, medium.sha256, made, medium.embedding)
        except (ChatBindError, OSError) as error:
            broken = isinstance(error, OSError | StoreError)
            if broken or len(self._waiting) > _MOST_WAITING:
                self._give_up(error)
            return error
        self._waiting.clear()
        return None

    def _give_up(self, error: Exception) -> None:
        if self._folder is None:
            return
        note(f"the cache of embeddings is not used: {error}; work goes on without it")
        self._folder, self._store = None, None
        self._waiting.clear()

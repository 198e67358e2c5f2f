"""The embedding store: media encoded once, read by training as often as it likes.

A folder with `store.json` (which encoder made it), shards in safetensors form, and a journal of
what came since the last shard was written. Each shard carries its own index columns, so there is
no second file that could disagree with it. Rows are keyed by content hash, preprocessing and
encoder; a row also has the name by which a training record asks for it. One process appends; any
number read at the same time, memory-mapped, and see the store as it was when they opened it.
Knows nothing of encoders, media files and training.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import torch

from chatbind_cli.data.store_journal import JournalContent, JournalWriter, read_journal
from chatbind_cli.data.store_meta import (
    DTYPES,
    JOURNAL_NAME,
    MADE_BY,
    META_NAME,
    StoreMeta,
    create_meta,
    read_meta,
    share_options,
    take_lock,
)
from chatbind_cli.data.store_shard import (
    Entry,
    HashIndex,
    Shard,
    content_hash,
    name_hash,
    write_shard,
)
from chatbind_cli.errors import StoreError
from chatbind_cli.folders import clear_temporaries, note_made, refuse_foreign, remove_made

ROWS_PER_SHARD = 8192  # 16 MiB at 1024 numbers of float16
_SHARDS = "shard-*.safetensors"


class EmbeddingStore:
    """Embeddings on disk. Made by `EmbeddingStore.open`, let go by `close` or a `with` block.

    Attributes:
        folder: where it lies.
        meta: what made it.
    """

    def __init__(
        self, folder: Path, meta: StoreMeta, lock: IO[bytes] | None, rows_per_shard: int
    ) -> None:
        self.folder = folder
        self.meta = meta
        self._lock = lock
        self._dtype = DTYPES[meta.dtype]
        self._rows_per_shard = rows_per_shard
        self._threads = threading.RLock()  # decoding threads look rows up while one adds
        self._writer: JournalWriter | None = None
        self._journal_size = 0
        self._fresh: list[Entry] = []
        self._fresh_vectors: list[torch.Tensor] = []
        self._fresh_rows: dict[int, list[int]] = {}  # hash of name or content -> row numbers
        self._read()

    @classmethod
    def open(
        cls,
        folder: str | Path,
        mode: Literal["r", "a"] = "r",
        *,
        encoder_sha256: str | None = None,
        encoder_name: str = "",
        dim: int | None = None,
        dtype: str | None = None,
        encoder_dtype: str | None = None,
        media_options: dict[str, Any] | None = None,
        rows_per_shard: int = ROWS_PER_SHARD,
    ) -> EmbeddingStore:
        """Opens a store to read ("r") or to append ("a"; makes a new one where there is none).

        Args:
            folder: the store.
            mode: "r" or "a".
            encoder_sha256: must be the store's; needed to make a new one.
            encoder_name: of a new store.
            dim: must be the store's; needed to make a new one.
            dtype: "float16" or "float32", must be the store's; float16 for a new one.
            encoder_dtype: in which the encoder works; must be the store's, if that says it.
            media_options: of rows that will be added (`MediaOptions.deciding`).
            rows_per_shard: when a shard counts as full.

        Raises:
            StoreError: there is no store, it is broken, it was made by another encoder, or
                another process is appending to it.
        """
        folder = Path(folder)
        lock = take_lock(folder) if mode == "a" else None
        try:
            if mode == "a" and not (folder / META_NAME).exists():
                create_meta(
                    folder, encoder_name, encoder_sha256, dim, dtype, encoder_dtype, media_options
                )
            meta = read_meta(folder)
            for what, ours, wanted in (
                ("encoder", meta.encoder_sha256, encoder_sha256),
                ("dim", meta.dim, dim),
                ("dtype", meta.dtype, dtype),
                ("encoder dtype", meta.encoder_dtype, meta.encoder_dtype and encoder_dtype),
            ):
                if wanted not in (None, ours):
                    raise StoreError(
                        f"was made with {what} {ours}, not {wanted}",
                        where=str(folder),
                        hint="choose another store, or --overwrite to start it anew",
                    )
            if mode == "a" and media_options is not None:
                meta = share_options(folder, meta, media_options)
            return cls(folder, meta, lock, rows_per_shard)
        except BaseException:
            if lock is not None:
                lock.close()
            raise

    def __len__(self) -> int:
        """The number of rows."""
        return self._starts[-1] + len(self._fresh)

    def __contains__(self, key: tuple[str, str]) -> bool:
        """Whether (modality, name) has an embedding."""
        modality, name = key
        return self.get(modality, name=name) is not None

    def kinds(self) -> set[tuple[str, str]]:
        """Which (modality, preprocessing) its rows have."""
        found = {(entry.modality, entry.fingerprint) for entry in self._fresh}
        return found.union((m, f) for shard in self._shards for m, f in shard.kinds)

    def has(self, name: str, modality: str, fingerprint: str) -> bool:
        """Whether a name has an embedding that was made with this preprocessing."""
        return self.get(modality, name=name, fingerprint=fingerprint) is not None

    def get(
        self,
        modality: str,
        *,
        name: str | None = None,
        content_sha256: str | None = None,
        fingerprint: str | None = None,
    ) -> torch.Tensor | None:
        """Returns an embedding as published (not normalised), float32 [dim], or None.

        Of several rows that fit, the newest counts.

        Args:
            modality: of the medium.
            name: the path as a training record gives it; None takes any.
            content_sha256: hash of the medium's bytes, hexadecimal; None takes any.
            fingerprint: of the preprocessing (`MediaOptions.fingerprint`); None takes any.

        Raises:
            ValueError: neither a name nor a hash is given.
        """
        with self._threads:
            row = self._find(
                modality, name=name, content_sha256=content_sha256, fingerprint=fingerprint
            )
            return None if row is None else self._vector(row).float()

    def add(
        self,
        name: str,
        modality: str,
        content_sha256: str,
        fingerprint: str,
        embedding: torch.Tensor,
    ) -> None:
        """Appends a row and hands it to the operating system: a kill afterwards does not lose it.

        Nothing happens where the store has this very content under this name already.

        Args:
            name: the path as training records give it.
            modality: of the medium.
            content_sha256: hash of the medium's bytes, hexadecimal.
            fingerprint: of the preprocessing.
            embedding: as published, not normalised, [dim].

        Raises:
            StoreError: the store is open for reading only, or the embedding is not finite in the
                store's dtype or of another length.
        """
        if self._lock is None:
            raise StoreError("is open for reading only", where=str(self.folder))
        vector = embedding.detach().to("cpu", self._dtype)
        if vector.shape != (self.meta.dim,):
            raise StoreError(
                f"has an embedding of {list(vector.shape)}; the store's are [{self.meta.dim}]",
                where=name,
            )
        if not torch.isfinite(vector).all():
            raise StoreError(
                f"has an embedding that is not finite in {self.meta.dtype}", where=name
            )
        entry = Entry(name, modality, content_sha256, fingerprint)
        with self._threads:
            newest = self._find(modality, name=name)
            if newest is None or self._entry(newest) != entry:
                self._append(entry, vector)

    def entries(self) -> Iterator[Entry]:
        """Yields what every row is, oldest first."""
        for shard in self._shards:
            yield from shard.entries()
        yield from self._fresh

    def close(self) -> None:
        """Turns the journal into a shard and lets go of the store."""
        if self._lock is None:
            return
        try:
            if self._fresh:
                self._seal()
            if self._writer is not None:
                self._writer.close()
        finally:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> EmbeddingStore:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the store."""
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Lets the worker processes of a data loader open the store anew, for reading."""
        return EmbeddingStore.open, (self.folder,)

    def _read(self) -> None:
        # The journal first: whoever seals it meanwhile has put its rows where we look next.
        journal = read_journal(self.folder / JOURNAL_NAME, self.meta.dim, self._dtype)
        paths = sorted(self.folder.glob(_SHARDS))
        self._shards = [Shard(path, self.meta.dim) for path in paths]
        if [path.name for path in paths] != [_shard_name(i) for i in range(len(paths))]:
            raise StoreError("lacks a shard in the middle", where=str(self.folder))
        self._starts = [0]
        for shard in self._shards:
            self._starts.append(self._starts[-1] + len(shard))
        self._by_name = HashIndex([shard.name_hashes for shard in self._shards])
        self._by_content = HashIndex([shard.content_hashes for shard in self._shards])
        self._fresh, self._fresh_vectors, self._fresh_rows = [], [], {}
        self._journal_size = 0
        self._target, self._base = self._append_position()
        if journal is None or self._is_spent(journal):
            return
        self._target, self._base, self._journal_size = journal.shard, journal.base, journal.size
        for entry, vector in zip(journal.entries, journal.embeddings, strict=True):
            self._remember(entry, vector)

    def _is_spent(self, journal: JournalContent) -> bool:
        """Whether a kill came between writing the shard of a journal and deleting the journal."""
        rows = len(self._shards[journal.shard]) if journal.shard < len(self._shards) else 0
        if rows < journal.base or journal.shard > len(self._shards):
            raise StoreError(
                f"lost rows of {_shard_name(journal.shard)} after its journal was begun",
                where=str(self.folder),
                hint="encode again with --overwrite",
            )
        return rows > journal.base

    def _append_position(self) -> tuple[int, int]:
        """Returns the number of the shard that grows next, and the rows it has."""
        if self._shards and len(self._shards[-1]) < self._rows_per_shard:
            return len(self._shards) - 1, len(self._shards[-1])
        return len(self._shards), 0

    def _start_writer(self) -> JournalWriter:
        clear_temporaries(self.folder)
        return JournalWriter(
            self.folder / JOURNAL_NAME,
            shard=self._target,
            base=self._base,
            keep=self._journal_size,
        )

    def _append(self, entry: Entry, vector: torch.Tensor) -> None:
        if self._is_full():  # a kill came after the last row of a shard
            self._seal()
        if self._writer is None:
            self._writer = self._start_writer()
        self._writer.append(entry, vector)
        self._remember(entry, vector)
        if self._is_full():
            self._seal()

    def _is_full(self) -> bool:
        return bool(self._fresh) and self._base + len(self._fresh) >= self._rows_per_shard

    def _seal(self) -> None:
        """Writes the journal's rows into the shard they are for, then deletes the journal."""
        entries, vectors = list(self._fresh), torch.stack(self._fresh_vectors)
        if self._base:
            grown = self._shards[self._target]
            entries = [*grown.entries(), *entries]
            vectors = torch.cat([grown.embeddings, vectors])
        note_made(self.folder, [_shard_name(self._target)], made_by=MADE_BY)
        write_shard(self.folder / _shard_name(self._target), entries, vectors)
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        (self.folder / JOURNAL_NAME).unlink(missing_ok=True)
        self._read()

    def _remember(self, entry: Entry, vector: torch.Tensor) -> None:
        row = self._starts[-1] + len(self._fresh)
        self._fresh.append(entry)
        self._fresh_vectors.append(vector)
        for hashed in (entry.name_hash, entry.content_hash):
            self._fresh_rows.setdefault(hashed, []).append(row)

    def _find(
        self,
        modality: str,
        *,
        name: str | None = None,
        content_sha256: str | None = None,
        fingerprint: str | None = None,
    ) -> int | None:
        """Returns the newest row that fits everything that is not None."""
        if name is not None:
            hashed, index = name_hash(modality, name), self._by_name
        elif content_sha256 is not None:
            hashed, index = content_hash(content_sha256), self._by_content
        else:
            raise ValueError("give a name or a content hash")
        for row in (*reversed(self._fresh_rows.get(hashed, [])), *index.newest_first(hashed)):
            entry = self._entry(row)
            if (
                entry.modality == modality
                and name in (None, entry.name)
                and content_sha256 in (None, entry.content_sha256)
                and fingerprint in (None, entry.fingerprint)
            ):
                return row
        return None

    def _entry(self, row: int) -> Entry:
        if row >= self._starts[-1]:
            return self._fresh[row - self._starts[-1]]
        shard = bisect_right(self._starts, row) - 1
        return self._shards[shard].entry(row - self._starts[shard])

    def _vector(self, row: int) -> torch.Tensor:
        if row >= self._starts[-1]:
            return self._fresh_vectors[row - self._starts[-1]]
        shard = bisect_right(self._starts, row) - 1
        return self._shards[shard].embeddings[row - self._starts[shard]]


def clear_store(folder: Path) -> None:
    """Deletes the store in a folder, if there is one.

    Raises:
        ChatBindError: another process is appending to it, or something else is in the folder.
    """
    refuse_foreign(folder, made_by=MADE_BY)
    if folder.is_dir() and any(folder.iterdir()):
        with take_lock(folder):
            remove_made(folder)


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"

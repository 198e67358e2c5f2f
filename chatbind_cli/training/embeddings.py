"""Embeddings for training: every distinct medium encoded once, before the first step.

The encoder is frozen, so its work is done ahead and kept in embedding stores under the run's
folder, one for each process, which a rerun continues. After that training needs neither encoder
nor media. Knows nothing of conversations and language models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from chatbind_cli.console import Progress
from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.errors import MediaError, StoreError
from chatbind_cli.imagebind.encoder import Encoder
from chatbind_cli.media.load import Media, load_media
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import MediaSource, open_source
from chatbind_cli.model.turns import MediaRef

_AT_ONCE = 64
_READERS = 4  # threads that decode ahead while a GPU encodes

Finder = Callable[[str], Path]
"""Turns a media name of a record into the file it means; raises MediaError."""


class Embeddings:
    """Embeddings by the names that records use, from one store or several."""

    def __init__(self, stores: Sequence[EmbeddingStore]) -> None:
        self._stores = list(stores)

    def __contains__(self, medium: MediaRef) -> bool:
        """Whether one of the stores has it."""
        return any((medium.modality, medium.ref) in store for store in self._stores)

    def rows(self, media: Iterable[MediaRef]) -> torch.Tensor | None:
        """The embeddings of media, float32 [media, dim], in order; None for no media.

        Raises:
            StoreError: a medium is not there.
        """
        found = [self._row(medium) for medium in media]
        return torch.stack(found) if found else None

    def _row(self, medium: MediaRef) -> torch.Tensor:
        for store in self._stores:
            row = store.get(medium.modality, name=medium.ref)
            if row is not None:
                return row
        raise StoreError(f"has no embedding of the {medium.modality} {medium.ref}")


@dataclass(frozen=True, kw_only=True)
class Share:
    """One process's part of the encoding."""

    folder: Path  # where the stores of all processes lie
    rank: int
    world_size: int

    @property
    def own(self) -> Path:
        """This process's own store."""
        return self.folder / f"part-{self.rank:05}"


def open_parts(folder: Path) -> list[EmbeddingStore]:
    """The stores that the processes of a run, and of killed ones before it, have filled."""
    # a process that was killed early has left a folder that is no store yet
    made = sorted(path.parent for path in folder.glob("part-*/store.json"))
    return [EmbeddingStore.open(part) for part in made]


def open_stores(folder: Path) -> list[EmbeddingStore]:
    """A store, or the several that a training run keeps in its `embeddings` folder.

    Raises:
        StoreError: there is none, or they were made by different encoders.
    """
    stores = open_parts(folder) or [EmbeddingStore.open(folder)]
    if len({store.meta.encoder_sha256 for store in stores}) > 1:
        raise StoreError("holds embeddings of different encoders", where=str(folder))
    return stores


def encode_media(
    media: Sequence[MediaRef],
    encoder: Encoder,
    find: Finder,
    share: Share,
    options: MediaOptions,
) -> list[tuple[MediaRef, str]]:
    """Encodes this process's share of media.

    Args:
        media: what no store has yet, the same on every process, without repeats.
        encoder: the frozen encoder.
        find: from names to files.
        share: which part is ours.
        options: how media become tensors.

    Returns:
        The media that cannot be read, each with the reason.
    """
    mine = media[share.rank :: share.world_size]
    failed: list[tuple[MediaRef, str]] = []
    store = EmbeddingStore.open(
        share.own,
        "a",
        encoder_sha256=encoder.sha256,
        encoder_name=encoder.name,
        dim=encoder.embedding_dim,
    )
    with store, Progress(len(mine), "encoding media", "files") as progress:
        for start in range(0, len(mine), _AT_ONCE):
            part = mine[start : start + _AT_ONCE]
            failed += _encode_part(part, encoder, find, store, options)
            progress.advance(len(part))
    return failed


@dataclass(frozen=True)
class _Read:
    """A medium that was looked at: its tensor, or a row that the store has of the same bytes."""

    medium: MediaRef
    source: MediaSource | None = None
    media: Media | None = None
    row: torch.Tensor | None = None
    error: str = ""


def _encode_part(
    part: Sequence[MediaRef],
    encoder: Encoder,
    find: Finder,
    store: EmbeddingStore,
    options: MediaOptions,
) -> Iterator[tuple[MediaRef, str]]:
    """Encodes a few dozen media together; yields those that failed."""

    def read(medium: MediaRef) -> _Read:
        try:
            source = open_source(find(medium.ref))
            row = store.get(
                medium.modality,
                content_sha256=source.sha256,
                fingerprint=options.fingerprint(medium.modality),
            )
            media = load_media(source, medium.modality, options) if row is None else None
        except MediaError as error:
            return _Read(medium, error=str(error))
        return _Read(medium, source, media, row)

    with ThreadPoolExecutor(_READERS) as pool:
        reads = list(pool.map(read, part))
    fresh = [read.media for read in reads if read.media is not None]
    rows = iter(encoder.embed(fresh, normalize=False))
    for result in reads:
        medium = result.medium
        if result.source is None:
            yield medium, result.error
            continue
        row = next(rows) if result.row is None else result.row
        fingerprint = options.fingerprint(medium.modality)
        try:
            store.add(medium.ref, medium.modality, result.source.sha256, fingerprint, row)
        except StoreError as error:
            yield medium, str(error)

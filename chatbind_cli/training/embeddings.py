"""Embeddings for training: every distinct medium encoded once, before the first step.

The encoder is frozen, so its work is done ahead and kept in embedding stores under the run's
folder, one for each process, which a rerun continues. After that training needs neither encoder
nor media. Knows nothing of conversations and language models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from chatbind_cli.console import Progress
from chatbind_cli.data.encode_sinks import StoreSink
from chatbind_cli.data.encoding import EncodingOptions, encode_items
from chatbind_cli.data.media_items import MediaFolder, MediaItem
from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.errors import StoreError
from chatbind_cli.imagebind.encoder import Encoder
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.model.turns import MediaRef
from chatbind_cli.training.rundir import part_name

_READERS = 4  # threads that decode ahead while a GPU encodes


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
        return self.folder / part_name(self.rank)


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
    folder: MediaFolder,
    share: Share,
    options: MediaOptions,
) -> list[tuple[MediaRef, str]]:
    """Encodes this process's share of media.

    Args:
        media: what no store has yet, the same on every process, without repeats.
        encoder: the frozen encoder.
        folder: where they lie.
        share: which part is ours.
        options: how media become tensors.

    Returns:
        The media that cannot be read, each with the reason.
    """
    mine = media[share.rank :: share.world_size]
    items = [
        MediaItem(path=medium.ref, name=medium.ref, modality=medium.modality, folder=folder)
        for medium in mine
    ]
    failed: list[tuple[MediaRef, str]] = []
    store = EmbeddingStore.open(
        share.own,
        "a",
        encoder_sha256=encoder.sha256,
        encoder_name=encoder.name,
        dim=encoder.embedding_dim,
    )
    with store, Progress(len(mine), "encoding media", "files") as progress:
        sink = StoreSink(store, options)
        results = encode_items(items, encoder, _how(encoder, sink, options))
        for medium, result in zip(mine, results, strict=True):
            if result.error is None:
                sink.write(result)
            else:
                failed.append((medium, str(result.error)))
            progress.advance()
    return failed


def _how(encoder: Encoder, sink: StoreSink, options: MediaOptions) -> EncodingOptions:
    on_cpu = encoder.device.type == "cpu"
    return EncodingOptions(
        media=options,
        workers=_READERS,
        batch_size=1 if on_cpu else encoder.batch_size,
        recall=sink.recall,
    )

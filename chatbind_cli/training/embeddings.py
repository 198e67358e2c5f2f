"""Embeddings for training: every distinct medium encoded once, before the first step.

The encoder is frozen, so its work is done ahead and kept in embedding stores under the run's
folder, one for each process, which a rerun continues. After that training needs neither encoder
nor media. Knows nothing of conversations and language models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatbind_cli.console import Progress
from chatbind_cli.data.encode_sinks import StoreSink
from chatbind_cli.data.encoding import EncodingOptions, encode_items
from chatbind_cli.data.lookup import Embeddings, open_stores, options_in
from chatbind_cli.data.media_items import MediaItem
from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.data.store_meta import StoreMeta
from chatbind_cli.imagebind.encoder import Encoder
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.root import MediaRoot
from chatbind_cli.model.config import MODEL_TYPE, ChatBindConfig, EncoderInfo, encoder_of
from chatbind_cli.model.loading import read_published
from chatbind_cli.training.rundir import part_name
from chatbind_cli.training.settings import TrainingSettings
from chatbind_cli.weights.json_file import read_json
from chatbind_cli.weights.projector_file import read_projector
from chatbind_cli.weights.published import is_published

_READERS = 4  # threads that decode ahead while a GPU encodes


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


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What is known of the embeddings that a projector or model has been trained on.

    Attributes:
        encoder: made them; None where training begins from nothing.
        media_options: how media became tensors; empty where nothing says.
    """

    encoder: EncoderInfo | None = None
    media_options: dict[str, Any] = field(default_factory=dict)


def origin_of(settings: TrainingSettings) -> Origin:
    """Looks into the projector, or the ChatBind model, that training goes on from.

    Raises:
        ChatBindError: it cannot be read.
    """
    if settings.projector is not None:
        info = read_projector(settings.projector).info
        return Origin(encoder=encoder_of(info), media_options=info.media_options)
    if is_published(settings.model):
        config = read_published(settings.model)[0]
    else:
        fields = read_json(settings.model / "config.json")
        if fields.get("model_type") != MODEL_TYPE:
            return Origin()
        config = ChatBindConfig.from_dict(fields)
    return Origin(encoder=encoder_of(config), media_options=config.media_options or {})


def stored_embeddings(
    settings: TrainingSettings, media: Iterable[Medium]
) -> tuple[Embeddings, MediaOptions, StoreMeta]:
    """The embeddings in the store of the settings, and how they were made.

    Raises:
        StoreError: they were made in other ways than the training before, or in several.
    """
    assert settings.store is not None
    stores = open_stores(settings.store)
    used = {medium.modality for medium in media if medium.modality is not None}
    trained = origin_of(settings).media_options
    options = options_in(stores, used, trained, where=str(settings.store))
    return Embeddings(stores, options), options, stores[0].meta


def encode_media(
    media: Sequence[Medium],
    encoder: Encoder,
    root: MediaRoot,
    share: Share,
    options: MediaOptions,
) -> list[tuple[Medium, str]]:
    """Encodes this process's share of media.

    Args:
        media: what no store has yet, the same on every process, without repeats.
        encoder: the frozen encoder.
        root: where they lie.
        share: which part is ours.
        options: how media become tensors.

    Returns:
        The media that cannot be read, each with the reason.
    """
    mine = media[share.rank :: share.world_size]
    items = [
        MediaItem(path=medium.name, name=medium.name, modality=medium.modality, root=root)
        for medium in mine
    ]
    failed: list[tuple[Medium, str]] = []
    store = EmbeddingStore.open(
        share.own,
        "a",
        encoder_sha256=encoder.sha256,
        encoder_name=encoder.name,
        dim=encoder.embedding_dim,
        encoder_dtype=encoder.dtype_name,
        media_options=options.deciding(),
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

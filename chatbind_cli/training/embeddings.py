"""Embeddings for training: every distinct medium encoded once, before the first step.

The encoder is frozen, so its work is done ahead and kept in embedding stores under the run's
folder, one for each process, which a rerun continues. After that training needs neither encoder
nor media.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.checkpoints.projector_file import is_published, read_projector
from chatbind_cli.console import Progress, note
from chatbind_cli.data.conversations import Media
from chatbind_cli.data.embedding_cache import EmbeddingCache
from chatbind_cli.data.encode import StoreSink, writable_store
from chatbind_cli.data.encoding import EncodingOptions, encode_items
from chatbind_cli.data.lookup import Embeddings, open_stores, options_in
from chatbind_cli.data.media_items import MediaItem
from chatbind_cli.encoders.encoder import Encoder
from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.errors import StoreError
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.root import MediaRoot
from chatbind_cli.model.config import MODEL_TYPE, ChatBindConfig, EncoderInfo, encoder_of
from chatbind_cli.model.loading import read_published
from chatbind_cli.training.settings import TrainingSettings

_READERS = 8  # threads or processes that decode ahead while a GPU encodes
_IMAGEBIND_WIDTH = 1024


def trained_on(settings: TrainingSettings) -> tuple[EncoderInfo | None, dict[str, Any]]:
    """What made the embeddings of the projector, or ChatBind model, that training goes on from.

    Returns:
        The encoder, None where training begins from nothing; and how media became tensors, empty
        where nothing says.

    Raises:
        ChatBindError: the projector or model cannot be read.
    """
    if settings.projector is not None:
        info = read_projector(settings.projector).info
        return encoder_of(info), info.media_options
    if is_published(settings.model):
        config = read_published(settings.model)[0]
    else:
        fields = read_json(settings.model / "config.json")
        if fields.get("model_type") != MODEL_TYPE:
            return None, {}
        config = ChatBindConfig.from_dict(fields)
    return encoder_of(config), config.media_options or {}


def stored_embeddings(
    settings: TrainingSettings, media: Media
) -> tuple[Embeddings, EncoderInfo, MediaOptions]:
    """The embeddings in the store of the settings, and what made them.

    Raises:
        StoreError: they were made by another encoder than the settings name, in other ways than
            the training before, or in several.
    """
    assert settings.store is not None
    stores = open_stores(settings.store)
    options = options_in(stores, media.modalities(), trained_on(settings)[1])
    meta, path = stores[0].meta, None
    if settings.encoder is not None:
        encoder = open_encoder(settings.encoder)
        if encoder.sha256 != meta.encoder_sha256:
            raise StoreError(
                f"was made by another encoder ({meta.encoder_name}) than --encoder names",
                where=str(settings.store),
            )
        path = encoder.reference
    info = EncoderInfo(
        name=meta.encoder_name,
        sha256=meta.encoder_sha256,
        embedding_dim=meta.dim,
        path=path,
        dtype=meta.encoder_dtype,
    )
    return Embeddings(stores, options), info, options


def identity_of(encoder: Encoder) -> EncoderInfo:
    """What a model says of the encoder whose embeddings it is trained on."""
    return EncoderInfo(
        name=encoder.name,
        sha256=encoder.sha256,
        embedding_dim=encoder.embedding_dim,
        path=encoder.reference,
        dtype=encoder.dtype_name,
    )


def assumed_encoder() -> EncoderInfo:
    """The encoder of a training that sees no media, where none is named."""
    note(
        f"the data name no media, and there is no --encoder: assuming embeddings of width "
        f"{_IMAGEBIND_WIDTH}, as ImageBind-Huge makes them"
    )
    return EncoderInfo(name="none", sha256=None, embedding_dim=_IMAGEBIND_WIDTH)


def encode_media(
    media: Sequence[Medium],
    encoder: Encoder,
    root: MediaRoot,
    part: Path,
    options: MediaOptions,
    cache_folder: Path | None = None,
) -> list[tuple[Medium, str]]:
    """Encodes one process's share of media, without repeats, into its own store.

    What a run before has left in the cache is copied from there, see `EmbeddingCache`.

    Returns:
        The media that cannot be read, each with the reason.
    """
    items = [MediaItem(medium, root, medium.name) for medium in media]
    failed: list[tuple[Medium, str]] = []
    batch_size = 1 if encoder.device.type == "cpu" else 2 * encoder.batch_size
    how = EncodingOptions(media=options, workers=_READERS, batch_size=batch_size, decode_in="auto")
    with (
        writable_store(part, encoder, options) as store,
        closing(EmbeddingCache(cache_folder, encoder, options)) as cache,
        Progress(len(items), "encoding media", "files") as progress,
    ):
        sink, new = StoreSink(store, options), []
        for item in items:
            if (found := cache.find(item)) is None:
                new.append(item)
            else:
                sink.write(found)
                progress.advance()
        if len(new) < len(items):
            note(f"{len(items) - len(new):,} embeddings were there already, in {cache_folder}")

        def recall(modality: str, sha256: str) -> torch.Tensor | None:
            known = sink.recall(modality, sha256)
            return cache.recall(modality, sha256) if known is None else known

        for result in encode_items(new, encoder, how, recall):
            if result.error is None:
                sink.write(result)
                cache.keep(result)
            else:
                failed.append((result.item.medium, str(result.error)))
            progress.advance()
    return failed

"""Media -> embeddings, for answering: several at once, each read once, none twice.

The encoder is found and read when the first medium comes, and of it only the towers that are
needed; a question without media needs none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from chatbind_cli.data.database import StoreMeta
from chatbind_cli.data.decoders import Loaded, Reading, decode
from chatbind_cli.data.encoding import NO_EMBEDDING, embed_each, is_embedding
from chatbind_cli.data.lookup import Embeddings, folders_of_each, open_stores
from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.encoders.encoder import Decoded, Encoder
from chatbind_cli.encoders.several import widen
from chatbind_cli.errors import ChatBindError, MediaError, StoreError, contained
from chatbind_cli.inference.loaded_model import LoadedModel, json_sha256
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import MediaSource, open_source
from chatbind_cli.model.config import EncoderInfo, encoder_of

_REMEMBERED = 1024
"""Embeddings that are kept: questions about one picture often follow each other."""


class MediaEncoder:
    """Turns media into embeddings with the model's encoder.

    As in training, unless `options` are given; `open_media` finds the bytes of media, of which
    `workers` are decoded at a time.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        options: MediaOptions | None = None,
        open_media: Callable[[str | Path | bytes], MediaSource] = open_source,
        workers: int = 1,
    ) -> None:
        self._model = model
        self._options = model.media_options() if options is None else options
        self._open_media = open_media
        self._decoding = threading.Semaphore(workers)
        self._encoding = threading.Lock()
        self._remembered: dict[tuple[str, str], torch.Tensor] = {}

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder, opened when first asked for.

        Raises:
            ChatBindError: it is not there, or not the one that the model was trained with.
        """
        return self._model.find_encoder()

    @cached_property
    def _heeded(self) -> MediaOptions:
        """The options, those that the encoder takes no notice of told once."""
        return self.encoder.heeded(self._options)

    def identity(self) -> dict[str, Any]:
        """What answers say of where the embeddings come from; nothing without an encoder.

        The hash of its weights only where the model's config.json does not say which they are.
        """
        try:
            encoder = self.encoder
        except ChatBindError:
            return {}  # said when the first medium comes; texts need no encoder
        known = {"encoder_config_sha256": json_sha256(encoder.settings)}
        if self._model.encoder_sha256 is None:
            known["encoder_sha256"] = encoder.sha256
        return known

    def embed(self, media: Sequence[Medium]) -> list[Medium | ChatBindError]:
        """Each medium with its modality and embedding, in order, or why there is none.

        The words of one of the modality `text` are its `ref`.

        An embedding does not depend on the other media.

        Raises:
            ChatBindError: the encoder cannot be used, so that no medium can be read.
        """
        return self.encode(media, self.read(media))

    def read(self, media: Sequence[Medium]) -> list[Loaded]:
        """The first half of `embed`: finds and decodes media; in as many threads as one likes.

        Raises:
            ChatBindError: the encoder cannot be used, so that no medium can be read.
        """
        return [self._read(medium) for medium in media]

    def _read(self, medium: Medium) -> Loaded:
        reading = Reading(self.encoder.modalities, self.encoder.read, self._heeded)
        if medium.modality != "text":
            with ExitStack() as stack:
                open_medium = partial(self._open, medium.ref, stack)
                return decode(medium, open_medium, reading, self._recall)
        if "text" not in reading.known:
            return reading.lacks("text")
        try:
            return self.encoder.read_text(str(medium.ref))
        except Exception as error:
            return contained(error, where="<text>")

    def _open(self, ref: str | Path | bytes, stack: ExitStack) -> MediaSource:
        source = self._open_media(ref)
        stack.enter_context(self._decoding)  # what comes now is work, and no wait
        return source

    def encode(
        self, media: Sequence[Medium], read: Sequence[Loaded]
    ) -> list[Medium | ChatBindError]:
        """The second half of `embed`: what was read of media, through the encoder together."""
        fresh = {_key(item): item for item in read if isinstance(item, Decoded)}
        with self._encoding:
            found = self._rows(list(fresh.values())) if fresh else []
            rows = dict(zip(fresh, found, strict=True))
            self._remembered |= {k: row for k, row in rows.items() if isinstance(row, torch.Tensor)}
            while len(self._remembered) > _REMEMBERED:
                self._remembered.pop(next(iter(self._remembered)))
        return [
            _embedded(medium, _key(item), rows[_key(item)]) if isinstance(item, Decoded) else item
            for medium, item in zip(media, read, strict=True)
        ]

    def _rows(self, media: list[Decoded]) -> list[torch.Tensor | ChatBindError]:
        """An embedding each; what does not fit in memory together is halved."""
        try:
            return embed_each(self.encoder, media)
        except torch.OutOfMemoryError:
            # the language model beside it may have taken all
            if len(media) == 1:
                where = media[0].source.name
                return [MediaError("there is no memory to embed it now", where=where)]
        half = len(media) // 2
        return self._rows(media[:half]) + self._rows(media[half:])

    def _recall(self, modality: str, sha256: str) -> torch.Tensor | None:
        return self._remembered.get((modality, sha256))


def _key(media: Decoded) -> tuple[str, str]:
    return media.modality, media.source.sha256


def _embedded(
    medium: Medium, key: tuple[str, str], row: torch.Tensor | ChatBindError
) -> Medium | ChatBindError:
    if isinstance(row, ChatBindError):
        return row
    return replace(medium, modality=key[0], sha256=key[1], embedding=row)


class StoredEmbeddings:
    """Finds embeddings in stores, where they lie under the names that records use.

    They must have been made with the model's encoder, each with any of several; rows that were made
    with other `options` than those are refused. The first store that has a medium counts.
    """

    def __init__(self, folders: Sequence[Path], model: LoadedModel, options: MediaOptions) -> None:
        self._pinned = model.encoder_sha256
        self._options = options
        self._widths = encoder_of(model.bundle.config).widths
        self._stores: list[_Stores] = []
        for folder in [place for given in folders for place in folders_of_each(given)]:
            found = open_stores(folder)
            number = _which(found[0], model)
            self._stores.append(
                _Stores(number, found[0].meta, Embeddings(found, options), Embeddings(found))
            )

    def identity(self) -> dict[str, Any]:
        """What answers say of where the embeddings come from."""
        metas = [one.meta for one in self._stores]
        known: dict[str, Any] = {
            "store_dtypes": [name for meta in metas for name in (meta.encoder_dtype, meta.dtype)]
        }
        if self._pinned:
            return known
        hashes = [meta.encoder_sha256 for meta in metas]
        return known | {"encoder_sha256": hashes[0] if len(hashes) == 1 else hashes}

    def read(self, media: Sequence[Medium]) -> list[Loaded]:
        """As `MediaEncoder.read`; nothing is read of media themselves."""
        return [*media]

    def encode(
        self, media: Sequence[Medium], read: Sequence[Loaded]
    ) -> list[Medium | ChatBindError]:
        """Each medium with its embedding, in order, or why there is none."""
        return [self._find(medium) for medium in media]

    def _find(self, medium: Medium) -> Medium | ChatBindError:
        if medium.modality is None:
            return MediaError("is of no known modality", where=medium.name)
        for one in self._stores:
            found = one.embeddings.find(medium)
            if found is not None and not is_embedding(found):
                return MediaError(NO_EMBEDDING, where=medium.name)
            if found is not None:
                row = found if one.number is None else widen(found, self._widths, one.number)
                return replace(medium, embedding=row)
        if any(medium in one.of_any_kind for one in self._stores):
            wanted = self._options.fingerprint(medium.modality)
            return MediaError(
                f"is in the store, but not as the model takes it ({wanted})",
                where=medium.name,
                hint="encode it with the options of the model's training, or give vqa those of "
                "the store",
            )
        return MediaError(
            "is not in the store",
            where=medium.name,
            hint="encode it into the store, or answer without --store",
        )


class _Stores(NamedTuple):
    """What lies in one folder: the rows of these options, and of any.

    Of the several encoders of a model, `number` says whose rows they are; None: the whole's.
    """

    number: int | None
    meta: StoreMeta
    embeddings: Embeddings
    of_any_kind: Embeddings


def _which(store: EmbeddingStore, model: LoadedModel) -> int | None:
    """The number of the encoder that a store's rows are of; None where they are of the whole.

    Raises:
        StoreError: they are of none of the model's, or may be of any.
    """
    meta, own = store.meta, encoder_of(model.bundle.config)
    whose: dict[int | None, EncoderInfo] = {None: own, **dict(enumerate(own.parts))}
    known = {n: one.sha256 if model.encoder_sha256 else None for n, one in whose.items()}
    fits = [n for n, one in whose.items() if one.embedding_dim == meta.dim]
    exact = [n for n in fits if known[n] == meta.encoder_sha256]
    found = exact[:1] or [n for n in fits if known[n] is None]
    if len(found) == 1:
        return found[0]
    names = " and ".join(one.name for one in own.each)
    raise StoreError(
        f"was made with the encoder {meta.encoder_name} ({meta.encoder_sha256[:12]}, width "
        f"{meta.dim}), which {'may be any' if found else 'is none'} of the model's: {names}",
        where=str(store.folder),
    )

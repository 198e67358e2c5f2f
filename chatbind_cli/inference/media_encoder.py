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
from typing import Any

import torch

from chatbind_cli.data.decoders import Loaded, Reading, decode
from chatbind_cli.data.encoding import NO_EMBEDDING, embed_each, is_embedding
from chatbind_cli.data.lookup import Embeddings, open_stores
from chatbind_cli.encoders.encoder import Decoded, Encoder
from chatbind_cli.errors import ChatBindError, MediaError, contained
from chatbind_cli.inference.loaded_model import LoadedModel, json_sha256
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import MediaSource, open_source

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
        reading = Reading(self.encoder.modalities, self.encoder.read, self._options)
        if medium.modality != "text":
            with ExitStack() as stack:
                open_medium = partial(self._open, medium.ref, stack)
                return decode(medium, open_medium, reading, self._recall)
        if "text" not in reading.known:
            return MediaError("the encoder has no tower for text")
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
    """Finds embeddings in a store, where they lie under the names that records use.

    It must have been made with the model's encoder; rows that were made with other `options` than
    those are refused.
    """

    def __init__(self, folder: Path, model: LoadedModel, options: MediaOptions) -> None:
        self._pinned = model.encoder_sha256
        dim = model.bundle.config.embedding_dim
        self._stores = open_stores(folder, encoder_sha256=self._pinned, dim=dim)
        self._embeddings = Embeddings(self._stores, options)
        self._of_any_kind = Embeddings(self._stores)
        self._options = options

    def identity(self) -> dict[str, Any]:
        """What answers say of where the embeddings come from."""
        meta = self._stores[0].meta
        known: dict[str, Any] = {"store_dtypes": [meta.encoder_dtype, meta.dtype]}
        return known if self._pinned else known | {"encoder_sha256": meta.encoder_sha256}

    def embed(self, media: Sequence[Medium]) -> list[Medium | ChatBindError]:
        """Each medium with its embedding, in order, or why there is none."""
        return self.encode(media, media)

    def read(self, media: Sequence[Medium]) -> list[Loaded]:
        """The first half of `embed`: nothing is read of media themselves."""
        return [*media]

    def encode(
        self, media: Sequence[Medium], read: Sequence[Loaded]
    ) -> list[Medium | ChatBindError]:
        """The second half of `embed`: looks media up."""
        return [self._find(medium) for medium in media]

    def _find(self, medium: Medium) -> Medium | ChatBindError:
        if medium.modality is None:
            return MediaError("is of no known modality", where=medium.name)
        found = self._embeddings.find(medium)
        if found is not None and not is_embedding(found):
            return MediaError(NO_EMBEDDING, where=medium.name)
        if found is not None:
            return replace(medium, embedding=found)
        if medium in self._of_any_kind:
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

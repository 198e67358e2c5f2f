"""Media -> embeddings, for answering: several at once, each read once, none twice.

The encoder is found and read when the first medium comes, and of it only the towers that are
needed; a question without media needs none. Where the bytes come from and what a question is, is
not known here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from chatbind_cli.data.encoding import NO_EMBEDDING, embed_each, is_embedding
from chatbind_cli.data.lookup import Embeddings
from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.errors import ChatBindError, MediaError, contained
from chatbind_cli.imagebind.encoder import Encoder
from chatbind_cli.imagebind.preprocess import Media, load_media
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.sniff import sniff
from chatbind_cli.media.source import MediaSource, open_source, shown

OpenMedia = Callable[[str | Path | bytes], MediaSource]

_REMEMBERED = 1024
"""Embeddings that are kept: questions about one picture often follow each other."""


@dataclass(frozen=True, eq=False)
class Percept:
    """A medium as the model takes it.

    Attributes:
        modality: what it is.
        sha256: hash of its content; None for one that came from a store.
        embedding: float32 [embedding_dim], as the encoder publishes it, not normalised.
    """

    modality: str
    sha256: str | None
    embedding: torch.Tensor


class Perceiver(Protocol):
    """Whatever knows the embeddings of media."""

    def look(self, attachments: Sequence[Medium]) -> list[Percept | ChatBindError]:
        """One embedding an attachment, in order, or why there is none."""
        ...


class Perception:
    """Turns media into embeddings.

    Args:
        open_encoder: finds and opens the encoder; called once, when it is needed.
        options: how media become tensors.
        open_media: finds the bytes that a reference means.
        workers: threads that read and decode media beside each other.
    """

    def __init__(
        self,
        open_encoder: Callable[[], Encoder],
        *,
        options: MediaOptions,
        open_media: OpenMedia = open_source,
        workers: int = 1,
    ) -> None:
        self.options = options
        self._open_encoder = open_encoder
        self._open_media = open_media
        self._encoder: Encoder | None = None
        self._pool = ThreadPoolExecutor(max_workers=max(1, workers))
        self._remembered: OrderedDict[tuple[str, str], torch.Tensor] = OrderedDict()

    @property
    def encoder(self) -> Encoder:
        """The encoder, opened when first asked for.

        Raises:
            ChatBindError: it is not there, or not the one that the model was trained with.
        """
        if self._encoder is None:
            self._encoder = self._open_encoder()
        return self._encoder

    def look(self, attachments: Sequence[Medium]) -> list[Percept | ChatBindError]:
        """The embeddings of media, or why there is none.

        Args:
            attachments: media; where the modality is None, the content tells it.

        Returns:
            One result an attachment, in order. An embedding does not depend on the others.

        Raises:
            ChatBindError: the encoder cannot be used, so that no medium can be read.
        """
        if not attachments:
            return []
        encoder = self.encoder
        known = set(encoder.modalities)
        loaded = list(self._pool.map(lambda one: self._load(one, known), attachments))
        fresh = {
            (item.source.sha256, item.modality): item for item in loaded if isinstance(item, Media)
        }
        rows = dict(zip(fresh, embed_each(encoder, list(fresh.values())), strict=True))
        return [self._percept(item, rows) for item in loaded]

    def _load(self, attachment: Medium, known: set[str]) -> Media | Percept | ChatBindError:
        """Decodes a medium, unless its embedding is remembered."""
        try:
            source = self._open_media(attachment.ref)
            found = attachment.modality or sniff(source)
            if found not in known:
                return MediaError(f"the encoder has no tower for {found}", where=source.name)
            remembered = self._remembered.get((source.sha256, found))
            if remembered is not None:
                return Percept(found, source.sha256, remembered)
            return load_media(source, found, self.options)
        except Exception as error:
            return contained(error, where=shown(attachment.name))

    def _percept(
        self,
        item: Media | Percept | ChatBindError,
        rows: dict[tuple[str, str], torch.Tensor | ChatBindError],
    ) -> Percept | ChatBindError:
        if not isinstance(item, Media):
            return item
        key = (item.source.sha256, item.modality)
        embedding = rows[key]
        if isinstance(embedding, ChatBindError):
            return embedding
        self._remembered[key] = embedding
        while len(self._remembered) > _REMEMBERED:
            self._remembered.popitem(last=False)
        return Percept(item.modality, item.source.sha256, embedding)


class StoredPerception:
    """Finds embeddings in a store, where they lie under the names that records use.

    Args:
        stores: open for reading, made with the model's encoder.
        options: how the model takes media; rows that were made otherwise are refused.
    """

    def __init__(self, stores: Sequence[EmbeddingStore], options: MediaOptions) -> None:
        self._embeddings = Embeddings(stores, options)
        self._of_any_kind = Embeddings(stores)
        self._options = options

    def look(self, attachments: Sequence[Medium]) -> list[Percept | ChatBindError]:
        """See `Perception.look`; the modality of each attachment must be known."""
        return [self._find(attachment) for attachment in attachments]

    def _find(self, attachment: Medium) -> Percept | ChatBindError:
        if attachment.modality is None:
            return MediaError("is of no known modality", where=attachment.name)
        found = self._embeddings.find(attachment)
        if found is not None and not is_embedding(found):
            return MediaError(NO_EMBEDDING, where=attachment.name)
        if found is not None:
            return Percept(attachment.modality, None, found)
        if attachment in self._of_any_kind:
            wanted = self._options.fingerprint(attachment.modality)
            return MediaError(
                f"is in the store, but not as the model takes it ({wanted})",
                where=attachment.name,
                hint="encode it with the options of the model's training, or give vqa those of "
                "the store",
            )
        return MediaError(
            "is not in the store",
            where=attachment.name,
            hint="encode it into the store, or answer without --store",
        )

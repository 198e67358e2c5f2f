"""Several encoders side by side: each medium goes to the first that knows its modality."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional

from chatbind_cli.encoders.encoder import Decoded, Encoder, Read
from chatbind_cli.files import sha256_text
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import MediaSource


@dataclass(frozen=True)
class _Reader:
    """Reads each medium as the encoder that gets it wants it."""

    reads: Mapping[str, Read]

    def __call__(self, source: MediaSource, modality: str, options: MediaOptions) -> torch.Tensor:
        return self.reads[modality](source, modality, options)


class SeveralEncoders(Encoder):
    """Encoders whose embeddings lie in spaces of their own.

    An embedding has the widths of all of them, in their order, and is zero but for what the one
    encoder made that it comes from: `widen` makes it so. Which one that was can thus be told from
    the embedding, and those of different encoders have cosine 0.

    Args:
        encoders: at least two, on one device and in one dtype.
    """

    def __init__(self, encoders: Sequence[Encoder]) -> None:
        first = encoders[0]
        super().__init__(
            reference=" + ".join(one.reference for one in encoders),
            name="+".join(one.name for one in encoders),
            device=first.device,
            dtype=first.dtype,
            batch_size=first.batch_size,
            attn_implementation=first.attn_implementation,
        )
        self._parts = tuple(encoders)
        self._widths = [one.embedding_dim for one in encoders]
        self._of: dict[str, int] = {}
        for number, one in enumerate(encoders):
            for modality in one.modalities:
                self._of.setdefault(modality, number)
        reads = {kind: encoders[n].read for kind, n in self._of.items() if kind != "text"}
        self.read = _Reader(reads)
        self.licence = licence_of_several([one.licence for one in encoders])

    @property
    def parts(self) -> tuple[Encoder, ...]:
        """The encoders."""
        return self._parts

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over theirs, in order."""
        return sha256_of_several([one.sha256 for one in self._parts])

    @property
    def settings(self) -> dict[str, Any]:
        """Theirs, in order."""
        return {"parts": [one.settings for one in self._parts]}

    @property
    def embedding_dim(self) -> int:
        """The sum of theirs."""
        return sum(self._widths)

    @property
    def modalities(self) -> tuple[str, ...]:
        """What any of them knows."""
        return tuple(self._of)

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """As the first one that knows texts has it."""
        return self._part("text").tokenize(texts)

    def load_tower(self, modality: str) -> torch.nn.Module:
        """The tower of the first that knows the modality."""
        return self._part(modality).tower(modality)

    def clips(self, item: Decoded) -> int:
        """As the encoder that gets the medium counts."""
        return self._part(item.modality).clips(item)

    def run(self, modality: str, batch: torch.Tensor) -> torch.Tensor:
        """Embeddings of a batch, among zeros."""
        rows = self._part(modality).run(modality, batch)
        return widen(rows, self._widths, self._of[modality])

    def heeds(self, modality: str, options: MediaOptions) -> Collection[str]:
        """As the encoder that gets such media does."""
        if modality not in self._of:
            return ()
        return self._part(modality).heeds(modality, options)

    def texts_beside(self, modality: str) -> str:
        """Which encoder gets such media, and what it has there."""
        kind = self._part(modality).texts_beside(modality)
        return f"{self._of[modality]} {kind}"

    def embed_texts(self, texts: Sequence[str], modality: str = "image") -> torch.Tensor:
        """Embeddings of texts by the encoder that gets such media, among zeros.

        Raises:
            WeightsError: one that gets media has no text tower.
        """
        for known, number in self._of.items():
            if known != "text" and "text" not in self._parts[number].modalities:
                raise self._parts[number].lacks("text")
        rows = self._part(modality).embed_texts(texts, modality)
        return widen(rows, self._widths, self._of[modality])

    def compare(self, embedding: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """As the encoder that made the embedding does, with its own embeddings of the texts."""
        pairs = zip(embedding.split(self._widths), texts.split(self._widths, dim=-1), strict=True)
        for one, (own, own_texts) in zip(self._parts, pairs, strict=True):
            if own.any():
                return one.compare(own, own_texts)
        return torch.zeros(len(texts))

    def _part(self, modality: str) -> Encoder:
        if modality not in self._of:
            raise self.lacks(modality)
        return self._parts[self._of[modality]]


def widen(rows: torch.Tensor, widths: Sequence[int], number: int) -> torch.Tensor:
    """Embeddings of one encoder of several, [..., its width] -> [..., sum of widths].

    Args:
        rows: the embeddings.
        widths: of all encoders.
        number: which of them made the rows.
    """
    before, after = sum(widths[:number]), sum(widths[number + 1 :])
    return functional.pad(rows, (before, after))


def sha256_of_several(hashes: Sequence[str]) -> str:
    """What several encoders are known by together."""
    return sha256_text(json.dumps(list(hashes)))


def licence_of_several(licences: Sequence[str | None]) -> str | None:
    """Those of all; of an encoder whose weights say none, that it is unknown."""
    if not any(licences):
        return None
    return " and ".join(dict.fromkeys(one or "unknown" for one in licences))

"""Embeddings by the names that records use, from one store or the several of a training run.

Of a medium that was encoded in several ways only the rows of one way count. Where several encoders
work side by side, each has stores of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from chatbind_cli.data.conversations import Media
from chatbind_cli.data.database import FILE_NAME
from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.encoders.several import widen
from chatbind_cli.errors import ChatBindError, StoreError
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.modality import MODALITIES
from chatbind_cli.media.options import MediaOptions

_ASKED_AT_ONCE = 1000
_ALIKE = ("chatbind", "pytorchvideo")  # clip samplers
_ANEW = "encode the media into a store of their own, all with the same options"


class Embeddings:
    """Embeddings of one encoder by the names that records use, from one store or several.

    Args:
        stores: where they are.
        options: how the media became tensors: rows that were made otherwise do not count. Without
            them the newest row counts, whatever made it.
        known: the modalities that the encoder knows.

    Attributes:
        known: see above.
    """

    def __init__(
        self,
        stores: Sequence[EmbeddingStore],
        options: MediaOptions | None = None,
        known: Collection[str] = MODALITIES,
    ) -> None:
        self._stores = list(stores)
        self.known = frozenset(known)
        self._made = {m: options.fingerprint(m) for m in MODALITIES} if options else {}

    def __contains__(self, medium: Medium) -> bool:
        """Whether one of the stores has it."""
        return self.find(medium) is not None

    def find(self, medium: Medium) -> torch.Tensor | None:
        """The embedding of a medium, float32 [dim]; None if there is none of these options."""
        if medium.modality is None:
            return None
        made = self._made.get(medium.modality)
        for store in self._stores:
            row = store.get(medium.modality, name=medium.name, fingerprint=made)
            if row is not None:
                return row
        return None

    def missing(self, media: Media) -> list[Medium]:
        """Those of many media of which there is no embedding, without reading any.

        Media that the encoder does not know are not missed.
        """
        missing: list[Medium] = []
        for modality in filter(self.known.__contains__, media.modalities()):
            names, made = media.names(modality), self._made.get(modality)
            for start in range(0, len(names), _ASKED_AT_ONCE):
                some = names[start : start + _ASKED_AT_ONCE]
                held = set().union(*(store.held(modality, some, made) for store in self._stores))
                missing += [Medium(modality, name) for name in some if name not in held]
        return missing

    def rows(self, media: Iterable[Medium]) -> torch.Tensor | None:
        """The embeddings of media, float32 [media, dim], in order; None for no media.

        Raises:
            StoreError: a medium is not there.
        """
        wanted = [(medium.modality, medium.name) for medium in media]
        found: dict[tuple[str | None, str], torch.Tensor] = {}
        for modality in {kind for kind, _ in wanted if kind is not None}:
            made = self._made.get(modality)
            for store in self._stores:
                left = [n for kind, n in wanted if kind == modality and (kind, n) not in found]
                rows = store.get_many(modality, left, made) if left else {}
                found.update({(modality, name): row for name, row in rows.items()})
        gone = next((medium for medium in wanted if medium not in found), None)
        if gone is not None:
            raise StoreError(f"has no embedding of the {gone[0]} {gone[1]}")
        return torch.stack([found[medium] for medium in wanted]) if wanted else None


class WideEmbeddings:
    """Those of one encoder or several, each in its place of a row that has all widths; see `widen`.

    Args:
        parts: of each encoder.
        widths: of each encoder's embeddings.

    Attributes:
        parts: see above.
        known: the modalities that any encoder knows.
    """

    def __init__(self, parts: Sequence[Embeddings], widths: Sequence[int]) -> None:
        self.parts = list(parts)
        self._widths = list(widths)
        self.known = frozenset().union(*(part.known for part in parts))

    def missing(self, media: Media) -> list[Medium]:
        """Those that an encoder knows and has no embedding of."""
        return list(dict.fromkeys(gone for part in self.parts for gone in part.missing(media)))

    def rows(self, media: Sequence[Medium], views: Iterable[int]) -> torch.Tensor | None:
        """The embeddings of media, float32 [media, sum of widths]; None for no media.

        Args:
            media: the media.
            views: the encoder of each, by number; one that does not know it leaves it to the first
                that does.

        Raises:
            StoreError: a medium is not there.
        """
        numbers = [self._number(*each) for each in zip(media, views, strict=True)]
        made = torch.zeros(len(media), sum(self._widths))
        for number, part in enumerate(self.parts):
            at = [i for i, chosen in enumerate(numbers) if chosen == number]
            rows = part.rows(media[i] for i in at)
            if rows is not None:
                made[at] = widen(rows, self._widths, number)
        return made if media else None

    def _number(self, medium: Medium, view: int) -> int:
        """The encoder that a medium goes to: that of the view, else the first that knows it."""
        order = [view, *range(len(self.parts))]
        return next((n for n in order if medium.modality in self.parts[n].known), view)


def part_name(number: int) -> str:
    """The folder, below one that holds several stores, of those of a process or shard."""
    return f"part-{number:05}"


def open_parts(folder: Path) -> list[EmbeddingStore]:
    """The stores that the processes of a run, and of killed ones before it, have filled."""
    # a process that was killed early has left a folder that is no store yet
    made = sorted(path.parent for path in folder.glob(f"part-*/{FILE_NAME}"))
    return [EmbeddingStore.open(part) for part in made]


def open_stores(folder: Path) -> list[EmbeddingStore]:
    """A store, or the several that a training run keeps in its `embeddings` folder.

    Raises:
        StoreError: there is none, or they were made by different encoders.
    """
    each = folders_of_each(folder)
    if each != [folder]:
        raise StoreError(
            "holds stores of several encoders",
            where=str(folder),
            hint=f"name them one by one: {' '.join(f'--store {place}' for place in each)}",
        )
    stores = open_parts(folder) or [EmbeddingStore.open(folder)]
    if len({(store.meta.encoder_sha256, store.meta.encoder_dtype) for store in stores}) > 1:
        raise StoreError("holds embeddings of different encoders", where=str(folder))
    return stores


def folders_of_each(folder: Path) -> list[Path]:
    """Where the stores of each encoder are in what a training run has left, or that folder."""
    return sorted(folder.glob("encoder-[1-9]")) or [folder]


def options_in(
    stores: Sequence[EmbeddingStore], used: Collection[str], trained: Mapping[str, Any]
) -> MediaOptions:
    """How the media of stores became tensors, as far as training is concerned.

    What training goes on from says it, else the stores do; what neither says is as ImageBind has
    it.

    Args:
        stores: what `open_stores` gave.
        used: the modalities that are trained on.
        trained: the media options of what training goes on from; empty where nothing is known.

    Raises:
        StoreError: a store says otherwise, or its rows of a modality that is used were made in
            another way, or in several ways of which nothing says which is meant.
    """
    where = str(stores[0].folder)
    told = dict(trained)
    for store in stores:
        for name, value in (store.meta.media_options or {}).items():
            other = told.setdefault(name, value)
            if other != value and not (other in _ALIKE and value in _ALIKE):
                raise StoreError(
                    f"the store has {name} {value}, what training goes on from has {other}",
                    where=where,
                    hint=_ANEW,
                )
    try:
        options = MediaOptions.known(told)
    except ChatBindError as error:
        raise StoreError(error.what, where=where, hint=error.hint) from error
    made = {kind for store in stores for kind in store.kinds()}
    for modality in used:
        ours = options.fingerprint(modality)
        found = {fingerprint for kind, fingerprint in made if kind == modality}
        others = found - {ours}
        if others and not (trained and ours in found):
            raise StoreError(
                f"holds {modality} embeddings that were made otherwise than {ours}: "
                f"{min(others)!r:.80}",
                where=where,
                hint=_ANEW,
            )
    return options

"""How well an encoder's senses find each other: retrieval between media of the same thing.

A projector that is trained on images alone can answer about another sense as far as its embeddings
lie where those of the images lie; pairs tell that before anything is trained, and which encoder
does it best.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from chatbind_cli.console import Progress, note
from chatbind_cli.data.encode import encoder_id
from chatbind_cli.data.encoding import EncodingOptions, at_once, encode_items
from chatbind_cli.data.media_items import MediaItem
from chatbind_cli.encoders.encoder import Encoder
from chatbind_cli.errors import ChatBindError, RecordError
from chatbind_cli.jsonl import Record, read_lines
from chatbind_cli.media.medium import Medium, media_of_record
from chatbind_cli.media.modality import MODALITIES
from chatbind_cli.media.root import MediaRoot
from chatbind_cli.plots import save_plot

_AT = (1, 5)
_ROWS = 1024  # of a matrix of similarities at a time
# of the way from chance to perfect retrieval, in the direction from the other sense to the first
_WELL, _PARTLY = 0.5, 0.1


class Pair(NamedTuple):
    """Two media of the same thing, in the order of `MODALITIES`, and the record's `class`."""

    first: Medium
    second: Medium
    kind: str | None

    @property
    def modalities(self) -> tuple[str, str]:
        """Of the first and of the second."""
        return str(self.first.modality), str(self.second.modality)


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs of the same two modalities.

    Attributes:
        modalities: of the first and of the second.
        first, second: [pairs, embedding_dim], of norm 1.
        kinds: of each pair, a number; pairs of one kind are of the same thing.
    """

    modalities: tuple[str, str]
    first: torch.Tensor
    second: torch.Tensor
    kinds: torch.Tensor


def read_pairs(path: str | Path) -> Iterator[Pair | RecordError]:
    """The pairs of a file of records like `{"image": "a.png", "audio": "a.wav", "class": "dog"}`.

    A record that is none, or does not name two media of different modalities, is an error among
    them.

    Raises:
        RecordError: the file cannot be read.
    """
    for record, where, _, problem in read_lines(path):
        try:
            pair: Pair | RecordError = problem or _pair_in(record, where)
        except RecordError as error:
            pair = error
        yield pair


def _pair_in(record: Record, where: str) -> Pair:
    media = sorted(
        media_of_record(record, where=where), key=lambda m: MODALITIES.index(str(m.modality))
    )
    if len(media) != 2 or media[0].modality == media[1].modality:
        raise RecordError("a pair names two media of different modalities", where=where)
    kind = record.get("class")
    return Pair(media[0], media[1], None if kind is None else str(kind))


def compare_encoders(
    pairs: Sequence[Pair], encoders: Iterable[Encoder], root: MediaRoot, options: EncodingOptions
) -> tuple[list[Record], list[str]]:
    """Measures each encoder on the pairs whose two modalities it knows; a note says what it lacks.

    Args:
        pairs: of any modalities.
        encoders: one after the other; none is kept.
        root: where the media lie.
        options: of encoding; batches are as the encoder wants them.

    Returns:
        What `retrieval` says, and `encoder` (name and hash) and `licence` before it, by pairs of
        modalities in the order of `pairs`; and what is wrong with media, each said once.

    Raises:
        ChatBindError: an encoder cannot be used, or none knows both modalities of any pair.
    """
    order = list(dict.fromkeys(pair.modalities for pair in pairs))
    found: list[Record] = []
    errors: dict[str, None] = {}
    for encoder in encoders:
        own = [pair for pair in pairs if {*pair.modalities} <= {*encoder.modalities}]
        if len(own) < len(pairs):
            kinds = dict.fromkeys(kind for both in order for kind in both)
            lacking = ", ".join(kind for kind in kinds if kind not in encoder.modalities)
            left = f"{len(pairs) - len(own)} of {len(pairs)} pairs are left out"
            note(f"{encoder.name} has no tower for {lacking}: {left}")
        groups, failed = encode_pairs(own, encoder, root, options) if own else ([], [])
        errors |= dict.fromkeys(map(str, failed))
        for group in groups:
            said = {"encoder": encoder_id(encoder), "licence": encoder.licence}
            found.append(said | retrieval(group))
    if not found and not errors:
        raise ChatBindError("no encoder knows both modalities of a pair")
    return sorted(found, key=lambda r: order.index((r["first"], r["second"]))), list(errors)


def encode_pairs(
    pairs: Sequence[Pair], encoder: Encoder, root: MediaRoot, options: EncodingOptions
) -> tuple[list[EncodedPairs], list[ChatBindError]]:
    """Encodes every medium once, and puts pairs of the same two modalities together.

    Returns:
        The pairs whose media can both be read; and what is wrong with the other media.
    """
    media = list(dict.fromkeys(m for pair in pairs for m in (pair.first, pair.second)))
    rows: dict[Medium, torch.Tensor] = {}
    errors: list[ChatBindError] = []
    items = [MediaItem(medium, root, medium.name) for medium in media]
    with Progress(len(items), f"encoding with {encoder.name}", "files") as progress:
        how = replace(options, batch_size=at_once(encoder))
        for result in encode_items(items, encoder, how):
            progress.advance()
            if result.error is not None:
                errors.append(result.error)
            elif result.medium.embedding is not None:
                rows[result.item.medium] = result.medium.embedding
    by_modality: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        if pair.first in rows and pair.second in rows:
            by_modality.setdefault(pair.modalities, []).append(pair)
    groups = [
        EncodedPairs(
            modalities,
            functional.normalize(torch.stack([rows[p.first] for p in some]).float(), dim=-1),
            functional.normalize(torch.stack([rows[p.second] for p in some]).float(), dim=-1),
            _numbered(some),
        )
        for modalities, some in by_modality.items()
    ]
    return groups, errors


def _numbered(pairs: Iterable[Pair]) -> torch.Tensor:
    """The kind of each pair as a number; one without a kind is like no other."""
    numbers: dict[Any, int] = {}
    kinds = [(n,) if p.kind is None else p.kind for n, p in enumerate(pairs)]
    return torch.tensor([numbers.setdefault(kind, len(numbers)) for kind in kinds])


def retrieval(pairs: EncodedPairs) -> Record:
    """What a table says of pairs.

    Returns:
        `first`, `second` (modalities), `pairs`; `recall_at_1`, `recall_at_5` (share of first media
        of which one of the nearest second ones, by cosine, is of the same kind) and
        `recall_back_at_1`, `recall_back_at_5` (from the second to the first), each beside
        `chance_at_1` and `chance_at_5`; `gap` (distance between the two modalities' means: 0 to 2);
        `outlook`: whether training on the first alone is likely to carry over to the second.
    """
    first, second = pairs.modalities
    n = len(pairs.kinds)
    found = {}
    for k in _AT:
        found[f"recall_at_{k}"] = _recall(pairs.first, pairs.second, pairs.kinds, k)
        found[f"recall_back_at_{k}"] = _recall(pairs.second, pairs.first, pairs.kinds, k)
        found[f"chance_at_{k}"] = _chance(pairs.kinds, k)
    between = pairs.first.mean(dim=0) - pairs.second.mean(dim=0)
    found["gap"] = float(torch.linalg.vector_norm(between))
    chance = found["chance_at_1"]
    skill = (found["recall_back_at_1"] - chance) / max(1 - chance, 1e-9)
    outlook = "good" if skill >= _WELL else "partial" if skill >= _PARTLY else "poor"
    figures = {name: round(value, 4) for name, value in found.items()}
    return {"first": first, "second": second, "pairs": n, **figures, "outlook": outlook}


def _recall(asked: torch.Tensor, among: torch.Tensor, kinds: torch.Tensor, k: int) -> float:
    hits = 0
    for start in range(0, len(asked), _ROWS):
        nearest = (asked[start : start + _ROWS] @ among.T).topk(min(k, len(among))).indices
        same = kinds[nearest] == kinds[start : start + _ROWS, None]
        hits += int(same.any(dim=1).sum())
    return hits / len(asked)


def _chance(kinds: torch.Tensor, k: int) -> float:
    """The same of nearest ones drawn at random, without putting back."""
    n = len(kinds)
    drawn = min(k, n)
    sizes = torch.bincount(kinds).tolist()
    return sum(size / n * (1 - comb(n - size, drawn) / comb(n, drawn)) for size in sizes)


def plot_retrieval(found: Sequence[Record], path: Path) -> None:
    """Draws recall at 1 both ways beside chance, and the gap between the means.

    Encoders stand side by side, each in a colour of its own, over every pair of modalities.

    Args:
        found: what `compare_encoders` gave.
        path: the picture; its suffix (.svg, .png, .pdf) says the format.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  half a second

    encoders = list(dict.fromkeys(r["encoder"] for r in found))
    pairs = list(dict.fromkeys((r["first"], r["second"]) for r in found))
    figure = Figure(figsize=(max(7, 1 + len(found)), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(encoders)
    for record in found:
        number = encoders.index(record["encoder"])
        left = pairs.index((record["first"], record["second"])) - 0.4 + number * width
        bars: dict[str, Any] = {"width": 0.45 * width, "align": "edge", "color": f"C{number}"}
        axes.bar(left, record["recall_at_1"], **bars)
        axes.bar(left + 0.45 * width, record["recall_back_at_1"], **bars, alpha=0.5)
        middle = left + 0.45 * width
        chance, gap = record["chance_at_1"], record["gap"]
        axes.plot([left, left + 0.9 * width], [chance, chance], "k-")
        axes.plot([middle], [gap], "D", color="white", mec=f"C{number}")
    for number, name in enumerate(encoders):
        axes.bar(0, 0, color=f"C{number}", label=f"{name}: R@1 there, and back (pale)")
    axes.plot([], [], "k-", label="chance")
    axes.plot([], [], "D", color="white", mec="black", label="distance of the means")
    axes.set_xticks(range(len(pairs)), ["\n".join(pair) for pair in pairs])
    axes.set(ylim=(0, None), title="Retrieval between modalities")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    save_plot(figure, path, "retrieval")

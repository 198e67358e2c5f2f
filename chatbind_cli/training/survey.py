"""What training will see of its data: samples as tokens, and how long, cut and padded they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from chatbind_cli.data.conversations import Conversation, Conversations
from chatbind_cli.data.tokens import PromptEncoder, TokenizedSample
from chatbind_cli.jsonl import Record
from chatbind_cli.model.label_loss import IGNORE_INDEX
from chatbind_cli.training.batches import Share, StepSampler
from chatbind_cli.training.packing import Packing, area

_BINS = 20
_PASSES = 8  # of a step, to reckon with
_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Reader:
    """Reads conversations as a model does.

    Attributes:
        encoder: writes them down as tokens.
        tokenizer: tells what its tokens are called.
        soft_token: the id that soft tokens stand under.
        tokens_per_medium: how many of them a medium has.
        max_length: longer samples are cut there.
    """

    encoder: PromptEncoder
    tokenizer: PreTrainedTokenizerBase
    soft_token: int | None
    tokens_per_medium: int
    max_length: int

    def sample(self, conversation: Conversation) -> Record:
        """A sample as training sees it: `id`, `where`, `tokens`, `trained` (of each), `cut`."""
        kept = self.encoder.conversation(conversation, self.max_length)
        return {
            "id": conversation.id,
            "where": conversation.where,
            "tokens": self.tokenizer.convert_ids_to_tokens(kept.input_ids),
            "trained": [label != IGNORE_INDEX for label in kept.labels],
            "media": [{str(medium.modality): medium.name} for medium in kept.media],
            "cut": kept.cut,
        }

    def pieces(self, conversation: Conversation) -> Iterator[tuple[str, str]]:
        """The sample as text, piece by piece, each with what it is: read, trained, or a medium."""
        kept = self.encoder.conversation(conversation, self.max_length)
        media = iter(kept.media)
        kinds = [self._kind(*both) for both in zip(kept.input_ids, kept.labels, strict=True)]
        end, told = 0, ""
        for kind, run in groupby(kinds):
            start, end = end, end + len(list(run))
            if kind == "medium":
                some = islice(media, (end - start) // self.tokens_per_medium)
                yield kind, "".join(f"[{medium.modality} {medium.name}]" for medium in some)
                told = self._text(kept.input_ids[:end])
                continue
            # a token alone may be half a character, or lack the space before it
            text = self._text(kept.input_ids[:end])
            yield kind, text[len(told) :]
            told = text

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))

    def _kind(self, token: int, label: int) -> str:
        if token == self.soft_token:
            return "medium"
        return "read" if label == IGNORE_INDEX else "trained"


def survey(
    reader: Reader, conversations: Conversations, chosen: Sequence[int], batch_size: int
) -> Record:
    """Figures about samples.

    Args:
        reader: as the model.
        conversations: all of them.
        chosen: which are looked at.
        batch_size: of forward passes, for the shares of padding.

    Returns:
        `samples`, `looked_at`, `media` (of each modality), `tokens` (`mean`, percentiles, `max`),
        `histogram` ([longest of the bin, samples] each), and, as shares of the tokens, `trained`
        and `prefix` (what all samples begin with), as shares of forward passes
        `padding`, and what is left of it where samples are `grouped` by length or `packed` into
        rows, as shares of the samples `cut` and `untrained` (without a token to learn from).
    """
    lengths, trained, cut = [], [], 0
    media: Counter[str] = Counter()
    prefix: list[int] | None = None
    for index in chosen:
        kept = reader.encoder.conversation(conversations[index], reader.max_length)
        cut += kept.cut > 0
        media.update(str(medium.modality) for medium in kept.media)
        lengths.append(len(kept.input_ids))
        trained.append(sum(label != IGNORE_INDEX for label in kept.labels))
        prefix = _common(kept, prefix, reader.soft_token)
    sizes = np.array(lengths)
    counts, edges = np.histogram(sizes, bins=min(_BINS, sizes.max() - sizes.min() + 1))
    return {
        "samples": len(conversations),
        "looked_at": len(sizes),
        "media": dict(media),
        "tokens": {
            "mean": round(float(sizes.mean()), 1),
            **{f"p{p}": int(np.percentile(sizes, p)) for p in _PERCENTILES},
            "max": int(sizes.max()),
        },
        "histogram": [[int(e), int(n)] for e, n in zip(edges[1:], counts, strict=True)],
        "trained": _share(sum(trained), sizes.sum()),
        "prefix": _share(len(prefix or ()) * len(sizes), sizes.sum()),
        **_padding(sizes, batch_size, reader.max_length),
        "cut": _share(cut, len(sizes)),
        "untrained": _share(trained.count(0), len(sizes)),
    }


def _common(sample: TokenizedSample, before: list[int] | None, soft_token: int | None) -> list[int]:
    """The tokens that all samples begin with, none of which trains or stands for a medium."""
    ids = sample.input_ids if before is None else before
    same = 0
    for ours, theirs, label in zip(ids, sample.input_ids, sample.labels, strict=False):
        if ours != theirs or label != IGNORE_INDEX or ours == soft_token:
            break
        same += 1
    return ids[:same]


def _padding(lengths: np.ndarray, batch_size: int, max_length: int) -> Record:
    """The shares of padding in forward passes as training makes them."""
    share = Share(samples=batch_size)
    packing = Packing(batch_size * max_length, max_length, samples=batch_size)
    areas = {"padding": 0, "grouped": 0, "packed": 0}
    for name, sizes in (("padding", None), ("grouped", lengths)):
        for step in StepSampler(len(lengths), batch_size * _PASSES, seed=0, sizes=sizes):
            own = lengths[step.samples]
            for one in share.passes(own, by_length=sizes is not None):
                areas[name] += area(own, [[sample] for sample in one])
            if sizes is None:
                areas["packed"] += sum(area(own, rows) for (rows,) in packing.passes(own, 1))
    return {name: _share(all_ - int(lengths.sum()), all_) for name, all_ in areas.items()}


def _share(part: int, whole: int) -> float:
    return round(float(part / max(whole, 1)), 4)

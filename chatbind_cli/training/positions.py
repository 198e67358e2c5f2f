"""Where in a batch media stand, what is labelled, and what all rows begin with.

Told by the processor that makes the batch, since a GPU would have to be waited for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chatbind_cli.model.config import ChatBindConfig
from chatbind_cli.model.label_loss import IGNORE_INDEX
from chatbind_cli.model.tokenizer import media_rows
from chatbind_cli.training.samples import Collator


@dataclass(frozen=True)
class WithPositions:
    """Adds to the batches of another collator what the model would have to look for.

    Args:
        collate: makes the batches.
        config: of the model; knows the placeholders.
        at_labels: whether logits are wanted at labelled positions alone.
        frozen: whether the language model stays as it is; then what all rows begin with is the
            same computation each time, and no work.
    """

    collate: Collator
    config: ChatBindConfig
    at_labels: bool
    frozen: bool

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The collator's padded batch of these samples, and where things are in it.

        Returns:
            the batch, with `media_positions` int64 [placeholders], `label_positions` int64 [n] if
            wanted (see `ChatBindForConditionalGeneration.forward`); and `prefix`, not for the
            model: the tokens, none of them of media, that all rows begin with before any that is
            labelled.
        """
        return self._placed(self.collate(samples))

    def packed(self, rows: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """The same of its packed batch."""
        return self._placed(self.collate.packed(rows))

    def _placed(self, batch: dict[str, Any]) -> dict[str, Any]:
        ids, labels = batch["input_ids"], batch["labels"]
        placeholders = ids == (-1 if self.config.im_patch_id is None else self.config.im_patch_id)
        batch["media_positions"] = placeholders.flatten().nonzero().squeeze(1)
        predicts = labels.roll(-1, dims=1) != IGNORE_INDEX
        predicts[:, -1] = False
        if self.at_labels:
            batch["label_positions"] = predicts.flatten().nonzero().squeeze(1)
        batch["prefix"] = ()
        if self.frozen and "position_ids" not in batch:
            unlabelled = int((~predicts.any(dim=0)).long().cumprod(dim=0).sum())
            lengths = batch["attention_mask"].sum(dim=1)
            shortest = min(int(lengths.min()), unlabelled, ids.shape[1] - 1)
            batch["prefix"] = self._prefix(ids[:, :shortest].tolist())
            batch["work"] = batch["work"].without_prefix(len(batch["prefix"]))
        return batch

    def _prefix(self, rows: list[list[int]]) -> tuple[int, ...]:
        trained = set(media_rows(self.config).values())
        first, last = min(rows), max(rows)  # in the order of words in a dictionary
        pairs = enumerate(zip(first, last, strict=True))
        ends = (n for n, (one, other) in pairs if one != other or one in trained)
        return tuple(first[: next(ends, len(first))])

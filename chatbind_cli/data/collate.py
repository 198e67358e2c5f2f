"""Training samples of different lengths to one batch of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chatbind_cli.data.tokens import IGNORE_INDEX
from chatbind_cli.errors import RecordError


@dataclass(frozen=True)
class Collator:
    """Pads training samples on the right.

    Args:
        pad_token_id: what fills `input_ids`.
        pad_to_multiple_of: lengths are rounded up to a multiple of this.

    Example:
        `Collator(0)([{"input_ids": [5, 6], "labels": [-100, 6], "media_embeddings": e}, ...])`
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """One batch.

        Args:
            samples: each with `input_ids` and `labels` (lists of the same length), and
                `media_embeddings` [media, embedding_dim] (None or absent for text only).

        Returns:
            `input_ids`, `attention_mask`, `labels` [batch, longest], and, where a sample has
            media, `media_embeddings` [media in the batch, embedding_dim], float32, in order.

        Raises:
            RecordError: there is no sample.
        """
        if not samples:
            raise RecordError("a batch needs at least one sample")
        length = _rounded(max(len(s["input_ids"]) for s in samples), self.pad_to_multiple_of)
        batch = {
            "input_ids": _padded([s["input_ids"] for s in samples], length, self.pad_token_id),
            "attention_mask": _padded([[1] * len(s["input_ids"]) for s in samples], length, 0),
            "labels": _padded([s["labels"] for s in samples], length, IGNORE_INDEX),
        }
        media = [s["media_embeddings"] for s in samples if s.get("media_embeddings") is not None]
        media = [m for m in media if len(m)]
        if media:
            batch["media_embeddings"] = torch.cat([m.float() for m in media])
        return batch


def _padded(rows: Sequence[Sequence[int]], length: int, value: int) -> torch.Tensor:
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.long)


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple

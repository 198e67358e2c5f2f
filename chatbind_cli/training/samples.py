"""The samples of a training run, and batches of them.

A sample is a conversation as tokens, with the embeddings of its media, made when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from chatbind_cli.data.conversations import Conversations
from chatbind_cli.data.lookup import WideEmbeddings
from chatbind_cli.data.tokens import PromptEncoder, TokenizedSample
from chatbind_cli.model.label_loss import IGNORE_INDEX
from chatbind_cli.training.throughput import Work


@dataclass(eq=False)
class TrainingSamples(Dataset[dict[str, Any]]):
    """Tokens, labels and embeddings of conversations.

    Args:
        conversations: what to train on.
        encoder: writes them down as tokens.
        embeddings: of all their media.
        max_length: longer samples are cut there.
    """

    conversations: Conversations
    encoder: PromptEncoder
    embeddings: WideEmbeddings
    max_length: int

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A sample as `Collator` takes it."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several samples, for which embeddings are looked up once."""
        return self.with_media(indices, [self.tokens(index) for index in indices])

    def tokens(self, index: int) -> TokenizedSample:
        """A sample that is yet without embeddings."""
        return self.encoder.conversation(self.conversations[index], self.max_length)

    def with_media(
        self, indices: Sequence[int], samples: Sequence[TokenizedSample]
    ) -> list[dict[str, Any]]:
        """The samples of these indices with the embeddings of their media."""
        media = [medium for sample in samples for medium in sample.media]
        views = [
            self.conversations.view(index)
            for index, sample in zip(indices, samples, strict=True)
            for _ in sample.media
        ]
        rows = self.embeddings.rows(media, views)
        made, start = [], 0
        for index, sample in zip(indices, samples, strict=True):
            own, start = slice(start, start + len(sample.media)), start + len(sample.media)
            made.append(
                {
                    "input_ids": sample.input_ids,
                    "labels": sample.labels,
                    "media_embeddings": rows[own] if rows is not None and sample.media else None,
                    "number": index,
                }
            )
        return made


@dataclass(frozen=True)
class Collator:
    """Makes one batch of samples of different lengths, padded on the right or side by side in rows.

    A sample has `input_ids` and `labels` (lists of the same length), and `media_embeddings`,
    float32 [media, embedding_dim]; None or absent for text only; `number`, if anybody asks which
    it is. A batch has `media_embeddings` [media in the batch, embedding_dim], float32, in order,
    where a sample has media; `work` and `samples` (their numbers) are not for the model.

    Args:
        pad_token_id: what fills `input_ids`.
        pad_to_multiple_of: lengths are rounded up to a multiple of this.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A padded batch: `input_ids`, `attention_mask`, `labels` [batch, longest], and the rest.

        Args:
            samples: one for each place of the batch.
        """
        lengths = torch.tensor([len(s["input_ids"]) for s in samples])
        ids = self._filled([s["input_ids"] for s in samples], self.pad_token_id)
        batch = {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
            "labels": self._filled([s["labels"] for s in samples], IGNORE_INDEX),
        }
        return {**batch, **_beside_tokens(samples, batch["labels"])}

    def packed(self, rows: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """A packed batch, see `packing`.

        Args:
            rows: samples that are read one after the other.

        Returns:
            `input_ids`, `labels` and `position_ids` [rows, longest], `sequence_lengths` (of every
            row, with what fills it up), and the rest. The first label of a sample never counts:
            what comes before it is another one.
        """
        tokens = [_joined(s["input_ids"] for s in row) for row in rows]
        ids = self._filled(tokens, self.pad_token_id)
        labels = self._filled([_joined(s["labels"] for s in row) for row in rows], IGNORE_INDEX)
        lengths = []
        for row in rows:
            own = [len(sample["input_ids"]) for sample in row]
            lengths.append([n for n in (*own, ids.shape[1] - sum(own)) if n > 0])
        positions = torch.tensor([_joined(map(range, row)) for row in lengths])
        labels[positions == 0] = IGNORE_INDEX
        batch: dict[str, Any] = {
            "input_ids": ids,
            "labels": labels,
            "position_ids": positions,
            "sequence_lengths": lengths,
        }
        return {**batch, **_beside_tokens(_joined(rows), labels)}

    def _filled(self, rows: Sequence[list[int]], value: int) -> torch.Tensor:
        multiple = self.pad_to_multiple_of
        filled = np.full((len(rows), -(-max(map(len, rows)) // multiple) * multiple), value)
        for place, row in enumerate(rows):
            filled[place, : len(row)] = row
        return torch.from_numpy(filled)


def _joined(parts: Iterable[Iterable[Any]]) -> list[Any]:
    return list(chain.from_iterable(parts))


def _beside_tokens(samples: Sequence[Mapping[str, Any]], labels: torch.Tensor) -> dict[str, Any]:
    """What a batch of samples has beside their tokens: see `Collator`; `labels` are the batch's."""
    media = [s["media_embeddings"] for s in samples if s.get("media_embeddings") is not None]
    labelled = int((labels[:, 1:] != IGNORE_INDEX).sum())
    return {
        **({"media_embeddings": torch.cat(media)} if media else {}),
        "work": Work.of((len(s["input_ids"]) for s in samples), labelled),
        "samples": [s.get("number", -1) for s in samples],
    }

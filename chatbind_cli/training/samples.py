"""The samples of a training run: conversations as tokens, with their media's embeddings.

Knows nothing of files, models and optimizers.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from chatbind_cli.data.conversations import Conversations
from chatbind_cli.data.lookup import Embeddings
from chatbind_cli.data.tokens import PromptEncoder


class TrainingSamples(Dataset[dict[str, Any]]):
    """Tokens, labels and embeddings of conversations, made when they are asked for.

    Args:
        conversations: what to train on.
        encoder: writes them down as tokens.
        embeddings: of all their media.
        max_length: longer samples are cut there.
    """

    def __init__(
        self,
        conversations: Conversations,
        encoder: PromptEncoder,
        embeddings: Embeddings,
        max_length: int,
    ) -> None:
        self._conversations = conversations
        self._encoder = encoder
        self._embeddings = embeddings
        self._max_length = max_length

    def __len__(self) -> int:
        """The number of samples."""
        return len(self._conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A sample as `data.collate.Collator` takes it."""
        sample = self._encoder.conversation(self._conversations[index], self._max_length)
        return {
            "input_ids": sample.input_ids,
            "labels": sample.labels,
            "media_embeddings": self._embeddings.rows(sample.media),
        }

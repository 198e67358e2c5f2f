"""Labels instead of training: which of some texts fits an embedding best.

The command reads the labels.

Source: ImageBind, section 4 (zero-shot classification with text prompts, as in CLIP).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chatbind_cli.encoders.encoder import Encoder
from chatbind_cli.errors import UsageError


class LabelScorer:
    """Compares embeddings with labels.

    Args:
        encoder: with a text tower.
        labels: at least one.
        prompt: the text that a label is put into, at `{label}`.

    Raises:
        UsageError: no labels, or a prompt without `{label}`.
        WeightsError: the encoder has no text tower.
    """

    def __init__(self, encoder: Encoder, labels: Sequence[str], prompt: str) -> None:
        if not labels:
            raise UsageError("there are no labels", hint="one a line")
        if "{label}" not in prompt:
            raise UsageError(f"the prompt {prompt!r} has no {{label}} in it")
        self.labels = list(labels)
        texts = [prompt.replace("{label}", label) for label in labels]
        self._encoder = encoder
        self._texts = encoder.embed_texts(texts)  # [labels, dim]

    def score(self, embedding: torch.Tensor, top_k: int) -> list[dict[str, str | float]]:
        """Returns the `label` and `probability` of the likeliest labels, the first one first.

        The probabilities of all labels add up to 1.

        Args:
            embedding: of one medium, [dim], as published.
            top_k: how many labels.
        """
        probabilities = self._encoder.compare(embedding, self._texts).softmax(dim=0)
        best = probabilities.topk(min(top_k, len(self.labels)))
        return [
            {"label": self.labels[int(index)], "probability": float(probability)}
            for probability, index in zip(best.values, best.indices, strict=True)
        ]

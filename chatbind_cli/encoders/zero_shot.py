"""Labels instead of training: which of some texts fits an embedding best.

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
        prompt: the text that a label is put into, at its `{label}`.

    Raises:
        UsageError: no labels.
        WeightsError: the encoder has no text tower.
    """

    def __init__(self, encoder: Encoder, labels: Sequence[str], prompt: str) -> None:
        if not labels:
            raise UsageError("there are no labels", hint="one a line")
        self.labels = list(labels)
        self._encoder = encoder
        self._prompts = [prompt.replace("{label}", label) for label in labels]
        self._texts: dict[str, torch.Tensor] = {}  # [labels, dim]
        self._beside(encoder.modalities[0])

    def score(
        self, embedding: torch.Tensor, top_k: int, modality: str
    ) -> list[dict[str, str | float]]:
        """Returns the `label` and `probability` of the likeliest labels, the first one first.

        The probabilities of all labels add up to 1.

        Args:
            embedding: of one medium, [dim], as published.
            top_k: how many labels.
            modality: of the medium.
        """
        texts = self._beside(modality)
        probabilities = self._encoder.compare(embedding, texts).softmax(dim=0)
        best = probabilities.topk(min(top_k, len(self.labels)))
        return [
            {"label": self.labels[int(index)], "probability": float(probability)}
            for probability, index in zip(best.values, best.indices, strict=True)
        ]

    def _beside(self, modality: str) -> torch.Tensor:
        """The labels as media of a modality are compared with them, [labels, dim]."""
        kind = self._encoder.texts_beside(modality)
        if kind not in self._texts:
            self._texts[kind] = self._encoder.embed_texts(self._prompts, modality)
        return self._texts[kind]

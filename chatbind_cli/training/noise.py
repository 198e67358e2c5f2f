"""Noise on embeddings in training, so that what learns from one modality serves another.

The embeddings of two modalities of the same thing lie apart. A projector that has learned to give
the same answer anywhere within such a distance of what it was shown bridges that gap. Source:
Nukrai, Mokady and Globerson, "Text-Only Training for Image Captioning using Noise-Injected CLIP",
2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class EmbeddingNoise:
    """Fresh Gaussian noise for every sample of every epoch.

    The same seed, epoch, sample and place of a medium give the same noise in every process, worker
    and rerun: numbers come from a generator that counts (Philox), not from one that goes on.

    Args:
        scale: about how long the noise is, as a multiple of the embedding's norm.
        seed: of the run.
        widths: of the embeddings of each encoder, which lie side by side in a row.
    """

    scale: float
    seed: int
    widths: Sequence[int]

    def add(self, rows: torch.Tensor, index: int, epoch: int) -> torch.Tensor:
        """The embeddings of a sample's media with noise.

        Each component's noise has the deviation `scale` * |e| / sqrt(width), so that its expected
        squared norm is (`scale` * |e|)^2. Where an encoder has made nothing, nothing is added.

        Args:
            rows: float32 [media, embedding_dim], not normalised.
            index: which sample it is.
            epoch: in which it is seen.

        Returns:
            New rows of the same shape.
        """
        key = np.array([self.seed, epoch], dtype=np.int64).astype(np.uint64)
        noise = np.empty(rows.shape, dtype=np.float32)
        for place, row in enumerate(noise):
            # drawing counts up the first word alone
            counter = np.array([0, 0, index, place], dtype=np.uint64)
            generator = np.random.Generator(np.random.Philox(counter=counter, key=key))
            generator.standard_normal(out=row, dtype=np.float32)
        both = (x.split(list(self.widths), dim=-1) for x in (rows, torch.from_numpy(noise)))
        return torch.cat([self._added(*part) for part in zip(*both, strict=True)], dim=-1)

    def _added(self, part: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        deviation = self.scale * part.norm(dim=-1, keepdim=True) / part.shape[-1] ** 0.5
        return part + deviation * drawn

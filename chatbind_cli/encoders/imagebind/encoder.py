"""ImageBind as an encoder: six towers in one weights file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from chatbind_cli.encoders.clip_text import tokenize
from chatbind_cli.encoders.encoder import Decoded, Encoder
from chatbind_cli.encoders.imagebind.config import HUGE, TEXT_CONTEXT, TOWER_OF
from chatbind_cli.encoders.imagebind.model import ImageBind
from chatbind_cli.encoders.imagebind.preprocess import read
from chatbind_cli.encoders.imagebind.weights import check_towers, find_encoder, load_tower
from chatbind_cli.files import sha256_file


class ImageBindEncoder(Encoder):
    """An ImageBind; its name is "imagebind_huge", or that of the folder that the weights lie in.

    Rows as published have the scale of their modality (audio 20, depth and IMU 5, thermal 10,
    images and videos 1), the clips of a recording averaged after scaling.

    Args:
        path: weights, or a folder with weights and config.json.
        how: the rest of what `Encoder` takes.

    Attributes:
        config: the sizes.
        towers: the towers the weights file holds.

    Raises:
        WeightsError: no weights there, or they do not fit the config (the first key that differs
            is named).
    """

    shared_towers: ClassVar[Mapping[str, str]] = {"video": "image"}

    def __init__(self, path: Path, **how: Any) -> None:
        weights, self.config = find_encoder(path)
        huge = self.config == HUGE
        self.path = weights.resolve()
        name = "imagebind_huge" if huge else self.path.parent.name
        super().__init__(name=name, **how)
        self.licence = "CC BY-NC-SA 4.0" if huge else None
        self.towers = check_towers(weights, self.config)
        self.read = read

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the weights file."""
        return sha256_file(self.path)

    @property
    def settings(self) -> dict[str, Any]:
        """The sizes."""
        return self.config.to_dict()

    @property
    def embedding_dim(self) -> int:
        """Length of an embedding (1024 for Huge)."""
        return self.config.out_embed_dim

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the weights have towers for."""
        return tuple(modality for modality, tower in TOWER_OF.items() if tower in self.towers)

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """CLIP's byte pairs, and zeros after them."""
        return tokenize(texts, TEXT_CONTEXT)

    def clips(self, item: Decoded) -> int:
        """The clips of a recording."""
        return item.tensor.shape[0] if item.modality in ("video", "audio") else 1

    def load_tower(self, modality: str) -> ImageBind:
        """An ImageBind of the one tower that a modality needs."""
        tower = TOWER_OF[modality]
        return load_tower(self.path, self.config, tower, device=self.device, dtype=self.dtype)

    def run(self, modality: str, batch: torch.Tensor) -> torch.Tensor:
        """Embeddings of a batch, scaled."""
        made: torch.Tensor = self.tower(modality)(modality, batch)
        return made

"""LanguageBind as an encoder: one repository, or several side by side, one a modality."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chatbind_cli.checkpoints.checkpoint import folder_of, open_checkpoint
from chatbind_cli.encoders.clip_text import tokenize
from chatbind_cli.encoders.encoder import Decoded, Encoder
from chatbind_cli.encoders.languagebind.config import VOCABULARY, find_repositories
from chatbind_cli.encoders.languagebind.preprocess import Reader
from chatbind_cli.encoders.languagebind.weights import check_repository, load_tower
from chatbind_cli.files import sha256_file, sha256_text
from chatbind_cli.media.options import FIELDS, MediaOptions


class LanguageBindEncoder(Encoder):
    """LanguageBind; its name is that of its folder.

    Rows as published have the learned scale of their modality, texts have norm 1. The text tower
    is that of the first repository whose vocabulary is CLIP's: all published ones hold the same.

    Args:
        path: a repository, its weights file, or a folder with several repositories.
        how: the rest of what `Encoder` takes.

    Attributes:
        repositories: what was found, by modality.

    Raises:
        WeightsError: two repositories are for one modality, or one does not fit its config.
        CheckpointError: a config.json is broken, or there are no weights.
    """

    licence = "MIT"
    scale_of_media = True

    def __init__(self, path: Path, **how: Any) -> None:
        folder = folder_of(path).resolve()
        self.repositories = find_repositories(folder)
        super().__init__(name=folder.name, **how)
        for repository in self.repositories.values():
            check_repository(repository)
        self.read = Reader({kind: found.vision for kind, found in self.repositories.items()})
        self._texts = next(
            (one for one in self.repositories.values() if one.text.vocab_size == VOCABULARY), None
        )

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over those of all weights files, and the settings, by modality."""
        return self._sha256_of(self.repositories)

    @property
    def sha256_before(self) -> frozenset[str]:
        """Those of every choice of its repositories."""
        kinds = list(self.repositories)
        some = chain.from_iterable(combinations(kinds, n) for n in range(1, len(kinds)))
        return frozenset(self._sha256_of(chosen) for chosen in some)

    def _sha256_of(self, modalities: Collection[str]) -> str:
        files = {kind: self._files[kind] for kind in modalities}
        settings = {kind: self.settings[kind] for kind in modalities}
        return sha256_text(json.dumps([files, settings], sort_keys=True))

    @cached_property
    def _files(self) -> dict[str, list[str]]:
        return {
            modality: [sha256_file(file.path) for file in open_checkpoint(found.folder).files]
            for modality, found in self.repositories.items()
        }

    @property
    def settings(self) -> dict[str, Any]:
        """What each config.json says of towers and preprocessing."""
        return {
            modality: {"vision": asdict(found.vision), "text": asdict(found.text)}
            for modality, found in self.repositories.items()
        }

    @property
    def embedding_dim(self) -> int:
        """Length of an embedding (768 but for Huge)."""
        return next(iter(self.repositories.values())).projection_dim

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those of the repositories, and text."""
        return (*self.repositories, *(() if self._texts is None else ("text",)))

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """CLIP's byte pairs, with the end-of-text token in all places after a text."""
        assert self._texts is not None
        return tokenize(texts, self._texts.text.max_position_embeddings, as_transformers=True)

    def clips(self, item: Decoded) -> int:
        """The frames of a film."""
        return item.tensor.shape[1] if item.modality == "video" else 1

    def heeds(self, modality: str, options: MediaOptions) -> Collection[str]:
        """The stretch of recordings, and the unit of depth; how clips lie is fixed."""
        if modality == "depth":
            return FIELDS["depth"] if options.depth_unit == "disparity" else ("depth_unit",)
        return ("start", "end") if modality in ("video", "audio") else ()

    def load_tower(self, modality: str) -> nn.Module:
        """The tower of a modality, or of texts."""
        text = modality == "text"
        repository = self._texts if text else self.repositories[modality]
        assert repository is not None
        return load_tower(repository, text=text, device=self.device, dtype=self.dtype)

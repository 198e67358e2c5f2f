"""The dialogue that was answered last: what its next turn begins with is not read again."""

from __future__ import annotations

from typing import Any

import torch

from chatbind_cli.data.tokens import TokenizedSample
from chatbind_cli.inference.prefill import beginning
from chatbind_cli.inference.rows import Rows
from chatbind_cli.media.medium import Medium


class Dialogue:
    """A row, the tokens that it has read, and the media among them."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._ids: list[int] = []
        self._media: tuple[Medium, ...] = ()
        self._rows = Rows(model)

    @torch.inference_mode()
    def read(self, prompt: TokenizedSample) -> torch.Tensor:
        """Reads a prompt as far as it is new; returns [1, vocabulary], for its next token.

        Raises:
            Exception: whatever the model raises; then the dialogue is not to be used again.
        """
        known, media = self._known(prompt)
        if known:
            self._rows.cut(known)
        else:
            self._rows = Rows(self._model)
        logits = self._rows.read([prompt.input_ids[known:]], prompt.media[media:])
        self._ids, self._media = list(prompt.input_ids), prompt.media
        return logits

    @torch.inference_mode()
    def go_on(self, token: int) -> torch.Tensor:
        """Reads a token of the answer; returns [1, vocabulary], for the one after."""
        logits = self._rows.read([[token]])
        self._ids.append(token)
        return logits

    def _known(self, prompt: TokenizedSample) -> tuple[int, int]:
        """How many tokens of a prompt are read already, and how many media among them."""
        config = self._model.config
        ids = prompt.input_ids
        # the last has to be read for what it says
        known = beginning(self._ids, ids[:-1])
        soft = [place for place, token in enumerate(ids) if token == config.im_patch_id]
        size = config.tokens_per_embedding
        for index, medium in enumerate(prompt.media):
            first, last = soft[index * size], soft[(index + 1) * size - 1]
            if first >= known:
                return known, index
            if last >= known or not _same(self._media[index], medium):
                return first, index
        return known, len(prompt.media)


def _same(old: Medium, new: Medium) -> bool:
    """Whether the language model reads two media alike."""
    if old.embedding is None or new.embedding is None:
        return False
    return old.weight == new.weight and torch.equal(old.embedding, new.embedding)

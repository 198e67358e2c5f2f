"""Prompts become rows: what many of them begin with is read once, the rest of each together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from chatbind_cli.data.tokens import TokenizedSample
from chatbind_cli.inference.rows import Rows
from chatbind_cli.model.chatbind import rotates_by_length

_SHORTEST = 8
"""Tokens in common below which reading them apart is not worth a pass of the model."""

# differences of logits, by their size, that are rounding
_RTOL: Final = 1e-3
_RTOL_HALF: Final = 5e-2


class Prefill:
    """Reads prompts, several at once, and remembers the tokens that they begin with.

    A system prompt is the same in all of them. Its keys and values are kept, up to the first
    medium, and put before the rest of each prompt. So that padding stands at the very left, and
    windows count right, rows read equally many tokens: shorter prompts read more of the beginning.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._ids: list[int] = []
        self._rows: Rows | None = None

    def rows(self) -> Rows:
        """A batch without rows."""
        return Rows(self._model)

    def learn(self, prompts: Sequence[TokenizedSample]) -> None:
        """Looks what these prompts, which come next, have in common; kept if it is worth it."""
        texts = [prompt.input_ids for prompt in prompts]
        # what the first and the last in order have in common all have
        common = min(texts)[: beginning(min(texts), max(texts))]
        patch = self._model.config.im_patch_id
        if patch in common:
            common = common[: common.index(patch)]
        known = beginning(self._ids, common)
        if len(prompts) > 1 and len(common) >= _SHORTEST and 2 * known < len(common):
            self._ids, self._rows = common, None

    @torch.inference_mode()
    def begin(self, prompts: Sequence[TokenizedSample]) -> tuple[Rows, torch.Tensor]:
        """Rows that have read the prompts, and what each says of its next token.

        A prompt that is there several times (the same object) is read once.
        """
        unique = list({id(prompt): prompt for prompt in prompts}.values())
        rows, logits = self._read(unique)
        if len(unique) == len(prompts):
            return rows, logits
        places = {id(prompt): place for place, prompt in enumerate(unique)}
        order = [places[id(prompt)] for prompt in prompts]
        return rows.repeated(order), logits[order]

    def _read(self, prompts: Sequence[TokenizedSample]) -> tuple[Rows, torch.Tensor]:
        lengths = [len(prompt.input_ids) for prompt in prompts]
        shared = min(beginning(self._ids, prompt.input_ids) for prompt in prompts)
        fresh = max(1, max(lengths) - shared)
        kept = [max(0, length - fresh) for length in lengths]
        rows = self._beginning().beginnings(kept) if any(kept) else Rows(self._model)
        rest = [prompt.input_ids[n:] for prompt, n in zip(prompts, kept, strict=True)]
        return rows, rows.read(rest, [medium for prompt in prompts for medium in prompt.media])

    def _beginning(self) -> Rows:
        if self._rows is None:
            rows = Rows(self._model)
            rows.read([self._ids])
            self._rows = rows
        return self._rows


def beginning(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with that are the same."""
    pairs = enumerate(zip(first, second, strict=False))
    different = (place for place, (one, other) in pairs if one != other)
    return next(different, min(len(first), len(second)))


@torch.inference_mode()
def row_obstacle(model: Any) -> str | None:
    """Why rows of a language model cannot come and go; None if they can, which is tried out."""
    short, long, following = [3, 4, 5], [6, 7, 8, 9, 10, 11, 12], 13
    ids = torch.tensor([[*short, following]], device=model.device)
    alone = model(input_ids=ids, use_cache=True)
    layers = getattr(getattr(alone, "past_key_values", None), "layers", [None])
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return "the language model keeps more than keys and values"
    rows = Rows(model)
    try:
        rows.read([short, long])
        found = rows.read([[following]] * 2)[0]
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return f"the language model does not go on from keys and values ({type(error).__name__})"
    wanted = alone.logits[0, -1].float()
    exact = {weight.dtype for weight in model.language_model.parameters()} == {torch.float32}
    rtol = _RTOL if exact else _RTOL_HALF
    if (found - wanted).norm() > rtol * wanted.norm():
        return "the language model says something else beside other rows"
    return None


def longest_together(config: Any) -> int | None:
    """Tokens up to which a row's numbers do not depend on how long others are; None: never."""
    if not rotates_by_length(config):
        return None
    original = config.rope_parameters.get("original_max_position_embeddings")
    known = (original, getattr(config, "original_max_position_embeddings", None))
    limits = [n for n in (*known, config.max_position_embeddings) if isinstance(n, int)]
    return min(limits)

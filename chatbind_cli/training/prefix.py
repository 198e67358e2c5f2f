"""What all samples of a batch begin with, computed once where the language model is frozen.

The tokens before the first medium are the same in every caption's sample, and nothing of them
trains: their keys and values are constants. A batch then is the rest of its rows, behind a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from chatbind_cli.console import note
from chatbind_cli.model.chatbind import (
    ChatBindForConditionalGeneration,
    rotates_by_length,
    word_embeddings,
)
from chatbind_cli.model.label_loss import IGNORE_INDEX
from chatbind_cli.training.checkpointing import recomputes

Batch = dict[str, Any]
States = tuple[torch.Tensor, torch.Tensor]  # keys and values of a layer

_RTOL: Final = 1e-5  # of a loss in float32; sums are rounded in another order
_RTOL_HALF: Final = 5e-3


class SharedPrefix:
    """Cuts off batches what their rows begin with, if that changes nothing.

    The first batch is computed both ways; should the losses differ, or the language model not go
    along, everything is computed plainly from there on.

    Args:
        model: the one that trains, not wrapped.
        autocast: makes the context in which it computes.
        wanted: whether to cut at all.
    """

    def __init__(
        self,
        model: ChatBindForConditionalGeneration,
        autocast: Callable[[], AbstractContextManager[Any]],
        *,
        wanted: bool,
    ) -> None:
        self._model = model
        self._autocast = autocast
        self._wanted = wanted
        self._tried = False
        self._tokens: tuple[int, ...] = ()
        self._states: list[States] = []

    def cut(self, batch: Batch) -> Batch:
        """The batch as the model takes it: without `prefix`, and without those tokens if it can be.

        Args:
            batch: of `WithPositions`, on the model's device.
        """
        batch = dict(batch)
        tokens = batch.pop("prefix", ())
        if not (self._wanted and tokens):
            return batch
        if not self._tried:
            if not bool((batch["labels"] != IGNORE_INDEX).any()):
                return batch  # of no loss nothing could be told
            self._tried, obstacle = True, self._obstacle(batch, tokens)
            if obstacle:
                note(f"--share-prefix has no effect: {obstacle}")
                self._wanted = False
                return batch
        if recomputes(self._model):
            return batch
        return self._behind(batch, tokens)

    def _obstacle(self, batch: Batch, tokens: tuple[int, ...]) -> str | None:
        """Why the rest of the rows behind a cache would not be the same; None if it is."""
        config = self._model.language_model.config
        if recomputes(self._model):
            return "gradient checkpointing keeps no keys and values"
        if rotates_by_length(config):
            return "the language model's positions depend on the length of the longest sample"
        if getattr(config, "output_router_logits", False):
            return "the language model's routers learn from all tokens"
        devices = [batch["input_ids"].device] if batch["input_ids"].is_cuda else []
        try:
            # the random state stays what it would have been
            with torch.no_grad(), torch.random.fork_rng(devices), self._autocast():
                before = _random_state(batch["input_ids"].device)
                plain = self._model(**batch).loss.float()
                if not torch.equal(before, _random_state(batch["input_ids"].device)):
                    return "dropout would make it another one each time"
                shared = self._model(**self._behind(batch, tokens)).loss.float()
                exact = word_embeddings(self._model)(batch["input_ids"][:1, :1]).dtype
                exact_too = not torch.is_autocast_enabled(plain.device.type)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return f"the language model does not go on from a cache ({type(error).__name__})"
        rtol = _RTOL if exact == torch.float32 and exact_too else _RTOL_HALF
        if torch.allclose(plain, shared, rtol=rtol, atol=rtol):
            return None
        return (
            f"the first batch's loss is {float(shared):.6g} with it and {float(plain):.6g} "
            "without (tokens look ahead)"
        )

    def _behind(self, batch: Batch, tokens: tuple[int, ...]) -> Batch:
        """The rest of the batch's rows, with a cache of what they begin with."""
        if tokens != self._tokens:
            self._states = self._computed(batch["input_ids"][:1, : len(tokens)])
            self._tokens = tokens
        rows, length = batch["input_ids"].shape
        cache = DynamicCache()
        for keys, values in self._states:
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys = keys.expand(rows, -1, -1, -1)
            layer.values = values.expand(rows, -1, -1, -1)
            cache.layers.append(layer)
        cut = len(tokens)
        rest = batch | {"past_key_values": cache}
        rest |= {name: batch[name][:, cut:] for name in ("input_ids", "labels")}
        for name in ("media_positions", "label_positions"):
            if name in batch:
                # of every row, its own, and all before it, so many positions are gone
                rest[name] = batch[name] - (batch[name] // length + 1) * cut
        return rest

    @torch.no_grad()
    def _computed(self, ids: torch.Tensor) -> list[States]:
        """Keys and values of tokens [1, n], each [1, heads, n, width of a head], of every layer."""
        with self._autocast():
            # told nothing of sliding windows, it keeps all; masks know the windows
            cache = DynamicCache()
            self._model.language_model.get_decoder()(
                inputs_embeds=word_embeddings(self._model)(ids),
                past_key_values=cache,
                use_cache=True,
            )
        return [(keys, values) for keys, values, _ in cache]


def _random_state(device: torch.device) -> torch.Tensor:
    """What random numbers on a device come next."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

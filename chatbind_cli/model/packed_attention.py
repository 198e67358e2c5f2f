"""Attention over packed rows, sequence by sequence, where flash-attn does not do it.

With a mask PyTorch's kernels compute every pair of positions of a row, though most belong to two
sequences. Here each sequence is a call of its own, of the same kernels: causal, without a mask; or
with its square of the mask, where the language model looks at less than what came before.
Everything that is not packed goes the way of `sdpa`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

Lengths = Sequence[Sequence[int]]  # [row][sequence], in tokens, with what fills the row up

NAME: Final = "chatbind_packed"
"""The kernels' name, as a language model's configuration has it."""

_longest: ContextVar[int | None] = ContextVar("longest", default=None)


def read_by_sequence(model: PreTrainedModel, *, on: bool) -> bool:
    """Gives a language model that runs with `sdpa` these kernels, or takes them away.

    Returns:
        Whether it now has them: not all models let their kernels be chosen.
    """
    if model.config._attn_implementation in ("sdpa", NAME):
        model.set_attn_implementation(NAME if on else "sdpa")
    return bool(model.config._attn_implementation == NAME)


@contextmanager
def packed_rows(model: PreTrainedModel, inputs: dict[str, Any]) -> Iterator[None]:
    """Within, a language model that has these kernels makes no mask for packed rows.

    Args:
        model: a language model.
        inputs: of it. `sequence_lengths` in them (see `Lengths`) are those of packed rows, and go
            with them to the attention, for layers that are computed twice, too. They are taken
            out, here and in place, if the model has other kernels.
    """
    lengths = inputs.get("sequence_lengths")
    if model.config._attn_implementation != NAME:
        inputs.pop("sequence_lengths", None)
        lengths = None
    token = _longest.set(None if lengths is None else max(map(max, lengths)))
    try:
        yield
    finally:
        _longest.reset(token)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sequence_lengths: Lengths | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As `sdpa_attention_forward`; returns [rows, length, heads, width].

    Args:
        module: the layer.
        query: [rows, heads, length, width]; `key` and `value`, too, but maybe of fewer heads.
        key: see `query`.
        value: see `query`.
        attention_mask: [rows, heads or 1, length, length]; None: causal.
        sequence_lengths: of the rows, if they are packed.
        **options: for the kernels.
    """
    if sequence_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows = []
    for row, lengths in enumerate(sequence_lengths):
        # a mask may be one for all rows
        masks = None if attention_mask is None else attention_mask.expand(len(query), -1, -1, -1)
        start, found = 0, []
        for length in lengths:
            here = slice(start, start + length)
            q, k, v = (states[row : row + 1, :, here] for states in (query, key, value))
            mask = None if masks is None else masks[row : row + 1, :, here, here]
            found.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
            start += length
        rows.append(torch.cat(found, dim=1))
    return torch.cat(rows), None


def _mask(*sizes: Any, **options: Any) -> torch.Tensor | None:
    """As `sdpa_mask`, but none where sequences are told and all that they need is to be causal."""
    longest = _longest.get()
    if longest is not None and not options.get("use_vmap"):  # a pattern of the model's own
        window = options.get("local_size")
        if window is None or window >= longest:
            return None
    return sdpa_mask(*sizes, **options)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)

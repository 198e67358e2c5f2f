"""Samples side by side in rows, in place of padding.

A packed row is read as transformers has it: position ids that begin anew at every sample, and no
attention mask. From these flash-attn takes the lengths of its sequences; on CPUs attention is told
them (`model.packed_attention`); and the masks of other kernels let no sample look at another. What
fills the end of a row is a sequence of its own, too, that nobody learns from.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import torch

from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration

Layout = list[list[list[list[int]]]]  # [pass][process][row][sample]

_STRETCH: Final = (1, 2, 3, 4)  # lengths of rows that are tried, in longest samples
_TRIED: Final = (5, 9)  # tokens of the two samples that `packs_exactly` looks at
# how far logits may lie apart, as a share of the largest
_ROUNDING, _ROUNDING_OF_HALF = 1e-4, 3e-2


@dataclass(frozen=True)
class Packing:
    """How many tokens go where.

    Attributes:
        tokens: a forward pass holds at most so many.
        row: a row holds at most so many, or one sample that is longer.
        one_row: whether a pass is a single row, where attention goes by sequence, as flash-attn's
            does; then `row` does not count.
        samples: as many passes are made as if each held so many samples; None: as few as possible.
        attention: the length of a row at which attention costs as much as all the rest.
    """

    tokens: int
    row: int
    one_row: bool = False
    samples: int | None = None
    attention: float = 8192.0

    def passes(self, lengths: np.ndarray, processes: int) -> Layout:
        """The samples of a step, laid out: the same in every process that asks.

        Of several layouts that takes least time of which processes wait for each other in every
        pass.

        Args:
            lengths: of the step's samples, in tokens.
            processes: that share the step; each has the same number of passes.

        Returns:
            For every pass, for every process, rows of sample numbers; no row where there were too
            few samples.
        """
        order = np.argsort(-lengths, kind="stable").tolist()
        found = [self._even(lengths, order, processes)]
        if not self.one_row:
            rows = [[[sample] for sample in order]]
            rows += [first_fit(lengths, order, most) for most in self._widths(lengths, order)]
            found += [self._dealt(lengths, one, processes) for one in rows]
        return min(found, key=lambda layout: self._time(lengths, layout))

    def _even(self, lengths: np.ndarray, order: list[int], processes: int) -> Layout:
        """Every sample goes where there are the fewest tokens so far, the longest first.

        Where one share would hold too much, there is one pass more.
        """
        count = -(-int(lengths.sum()) // (self.tokens * processes))
        if self.samples is not None:
            count = max(count, -(-len(order) // (self.samples * processes)))
        while True:
            packed = [self._rows(lengths, one) for one in _spread(lengths, order, count, processes)]
            if count >= len(order) or all(area(lengths, r) <= self.tokens for r in packed):
                return [packed[i : i + processes] for i in range(0, len(packed), processes)]
            count += 1

    def _dealt(self, lengths: np.ndarray, rows: list[list[int]], processes: int) -> Layout:
        """Rows of about the same length share a pass, in all processes."""
        rows = sorted(rows, key=lambda row: -int(lengths[row].sum()))
        most = len(rows)
        if self.samples is not None:
            passes = -(-len(lengths) // (self.samples * processes))
            most = -(-len(rows) // (passes * processes))
        ends = [0]
        while ends[-1] < len(rows):
            fit = self.tokens // int(lengths[rows[ends[-1]]].sum())
            ends.append(ends[-1] + max(min(fit, most), 1) * processes)
        return [
            [rows[start + rank : end : processes] for rank in range(processes)]
            for start, end in pairwise(ends)
        ]

    def _rows(self, lengths: np.ndarray, chosen: list[int]) -> list[list[int]]:
        """Rows of the width that costs least, or one row."""
        if self.one_row or len(chosen) < 2:
            return [chosen] if chosen else []
        tried = [first_fit(lengths, chosen, most) for most in self._widths(lengths, chosen)]
        return min(tried, key=lambda rows: self._time(lengths, [[rows]]))

    def _widths(self, lengths: np.ndarray, order: list[int]) -> list[int]:
        """Of rows: a few times the longest sample."""
        longest = int(lengths[order[0]])
        return sorted({max(longest, min(longest * k, self.row)) for k in _STRETCH})

    def _time(self, lengths: np.ndarray, layout: Layout) -> float:
        """About how long a layout takes, in tokens of short rows."""
        total = 0.0
        for shares in layout:
            areas = [(area(lengths, rows), len(rows)) for rows in shares]
            total += max(a * (1 + a / max(n, 1) / self.attention) for a, n in areas)
        return total


def _spread(lengths: np.ndarray, order: list[int], count: int, processes: int) -> list[list[int]]:
    """Samples in `count` x `processes` heaps of about as many tokens, the longest of each first."""
    heaps = [(0, place) for place in range(count * processes)]
    spread: list[list[int]] = [[] for _ in heaps]
    for sample in order:
        tokens, place = heaps[0]
        spread[place].append(sample)
        heapq.heapreplace(heaps, (tokens + int(lengths[sample]), place))
    return spread


def first_fit(lengths: np.ndarray, order: Sequence[int], most: int) -> list[list[int]]:
    """Rows of at most so many tokens: each sample goes into the first that has room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for sample in order:
        length = int(lengths[sample])
        fits = next((n for n, left in enumerate(room) if length <= left), None)
        if fits is None:
            rows.append([sample])
            room.append(most - length)
        else:
            rows[fits].append(sample)
            room[fits] -= length
    return rows


def area(lengths: np.ndarray, rows: list[list[int]]) -> int:
    """The tokens of a pass of these rows of samples, with what fills them up."""
    return len(rows) * max((int(lengths[row].sum()) for row in rows), default=0)


@torch.no_grad()
def packs_exactly(
    model: ChatBindForConditionalGeneration, device: torch.device, *, precise: bool
) -> bool:
    """Whether a model reads two samples side by side as it reads them apart.

    Not all do: a state-space layer carries its state on, and there are positions that nobody can
    set. What decides is a trial.

    Args:
        model: in any mode, in which it is left.
        device: where it is.
        precise: whether it computes in float32, and in nothing less.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.im_patch_id or model.config.get_text_config().vocab_size
    short, long = (torch.randint(vocabulary, (n,), generator=generator) for n in _TRIED)
    apart = torch.zeros(2, len(long), dtype=torch.long)
    apart[0, : len(short)], apart[1] = short, long
    mask = torch.ones_like(apart)
    mask[0, len(short) :] = 0
    positions = torch.cat([torch.arange(n) for n in _TRIED])
    was_training = model.training
    model.eval()
    try:
        wanted = model(
            input_ids=apart.to(device), attention_mask=mask.to(device), use_cache=False
        ).logits
        found = model(
            input_ids=torch.cat([short, long])[None].to(device),
            position_ids=positions[None].to(device),
            sequence_lengths=[_TRIED],
            use_cache=False,
        ).logits
    finally:
        model.train(was_training)
    wanted = torch.cat([wanted[0, : len(short)], wanted[1]])
    error = float((found[0] - wanted).abs().max() / wanted.abs().max())
    return error <= (_ROUNDING if precise else _ROUNDING_OF_HALF)

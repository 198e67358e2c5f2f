"""Rows of text that a language model reads on: their keys and values, while rows come and go.

All rows end at the same column, and shorter ones are padded on the left: so windows that count
columns and positions that count the mask are right without anybody knowing of them. The cache is
transformers' own, told nothing of sliding windows; masks know the windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from chatbind_cli.media.medium import Medium
from chatbind_cli.model.chatbind import media_inputs

_ROOM = 64
"""Columns that a buffer has in reserve when it is made; each copy of it is paid for by so many."""


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer [rows, heads, columns, width of a head], in buffers with room.

    transformers' own copies everything for each token. `keys` and `values` are what is used of the
    buffers: the first rows, and a stretch of the columns.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Begins with rows of no column."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._hold(key_states[:, :, :0], value_states[:, :, :0])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds columns; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, length = self.keys.shape[0], self.keys.shape[-2]
        more = key_states.shape[-2]
        self._reserve(rows, right=more)
        self._show(rows, self._first, length + more)
        self.keys[:, :, length:] = key_states
        self.values[:, :, length:] = value_states
        return self.keys, self.values

    def make_room(self, other: GrowingLayer) -> None:
        """Makes sure of room for the rows of another layer: after it, nothing can go wrong."""
        left = max(0, other.keys.shape[-2] - self.keys.shape[-2])
        self._reserve(len(self.keys) + len(other.keys), left=left)

    def join(self, other: GrowingLayer) -> None:
        """Adds the rows of another layer, for which there is room."""
        rows, length = self.keys.shape[0], self.keys.shape[-2]
        total, theirs = rows + other.keys.shape[0], other.keys.shape[-2]
        left = max(0, theirs - length)
        self._show(total, self._first - left, length + left)
        blank = length + left - theirs
        for mine, new in ((self.keys, other.keys), (self.values, other.values)):
            # what stood there before may be no number, and times nothing that is no number either
            mine[:rows, :, :left] = 0
            mine[rows:, :, :blank] = 0
            mine[rows:, :, blank:] = new

    def keep(self, rows: int, length: int, moved: Sequence[tuple[int, int]] = ()) -> None:
        """Keeps the first `rows` and last `length` columns, after rows have moved (from, to)."""
        if moved:
            sources, targets = map(list, zip(*moved, strict=True))
            self.keys[targets] = self.keys[sources]
            self.values[targets] = self.values[sources]
        self._show(rows, self._first + self.keys.shape[-2] - length, length)

    def cut(self, length: int) -> None:
        """Drops all columns but the first `length`."""
        self._show(self.keys.shape[0], self._first, length)

    def picked(self, rows: torch.Tensor, columns: torch.Tensor) -> GrowingLayer:
        """A new layer of some rows, [n], each with its own columns [n, length] of this one's."""
        layer = GrowingLayer()
        layer.dtype, layer.device, layer.is_initialized = self.dtype, self.device, True
        # indices on both sides of the heads go before them: [n, length, heads, width]
        keys, values = (x[rows.unsqueeze(1), :, columns] for x in (self.keys, self.values))
        layer._hold(keys.transpose(1, 2), values.transpose(1, 2))
        return layer

    def _hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._buffers = (keys, values)
        self._show(keys.shape[0], 0, keys.shape[-2])

    def _show(self, rows: int, first: int, length: int) -> None:
        self._first = first
        self.keys, self.values = (b[:rows, :, first : first + length] for b in self._buffers)

    def _reserve(self, rows: int, *, left: int = 0, right: int = 0) -> None:
        """Makes sure of room for so many rows and more columns on both sides."""
        length = self.keys.shape[-2]
        held, columns = self._buffers[0].shape[0], self._buffers[0].shape[-2]
        if rows <= held and left <= self._first and self._first + length + right <= columns:
            return
        copies = []
        for old in (self.keys, self.values):
            size = (rows, old.shape[1], left + length + right + _ROOM, old.shape[-1])
            new = old.new_zeros(size)
            new[: len(old), :, left : left + length] = old
            copies.append(new)
        used = self.keys.shape[0]
        self._buffers = (copies[0], copies[1])
        self._show(used, left, length)


class Rows:
    """A batch under way: rows of tokens that a model has read, of different lengths.

    Attributes:
        lengths: tokens of each row. The cache has as many columns as the longest has tokens.
    """

    def __init__(self, model: Any) -> None:
        self.lengths: list[int] = []
        self._before: list[int] = []
        self._model = model
        self._cache = DynamicCache()
        self._cache.layer_class_to_replicate = GrowingLayer

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def columns(self) -> int:
        """Columns of the cache."""
        return max(self.lengths, default=0)

    @property
    def _layers(self) -> list[GrowingLayer]:
        return cast(list[GrowingLayer], self._cache.layers)

    @torch.inference_mode()
    def read(self, tokens: Sequence[Sequence[int]], media: Sequence[Medium] = ()) -> torch.Tensor:
        """Reads as many more tokens of each row; a new row may have less, and is padded.

        Args:
            tokens: of each row.
            media: whose tokens are among them, with their embeddings, row by row.

        Returns:
            [rows, vocabulary], float32: what each row says of its next token.

        Raises:
            TypeError: the model keeps something else, or nothing, in place of keys and values.
            Exception: whatever the model raises; then `rewind`.
        """
        device = self._model.device
        most = max(map(len, tokens))
        ids = torch.tensor([[0] * (most - len(row)) + list(row) for row in tokens], device=device)
        self._before = self.lengths
        before = self.lengths or [0] * len(tokens)
        lengths = [old + len(row) for old, row in zip(before, tokens, strict=True)]
        columns = torch.arange(self.columns + most, device=device)
        blank = len(columns) - torch.tensor(lengths, device=device).unsqueeze(1)
        output = self._model(
            input_ids=ids,
            attention_mask=(columns >= blank).long(),
            position_ids=(columns[-most:] - blank).clamp(min=0),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **media_inputs(media, device),
        )
        if {layer.get_seq_length() for layer in self._layers} != {len(columns)}:
            raise TypeError("the language model does not keep keys and values")
        self.lengths = lengths
        return output.logits[:, -1].float()

    def rewind(self) -> None:
        """Forgets what was just read, or read in part."""
        self.lengths = self._before
        self._cut()

    def cut(self, length: int) -> None:
        """Forgets what the only row has beyond its first `length` tokens."""
        self.lengths = [length]
        self._cut()

    def _cut(self) -> None:
        for layer in self._layers:
            if layer.is_initialized:
                layer.cut(self.columns)

    @torch.inference_mode()
    def drop(self, gone: set[int]) -> list[int]:
        """Lets rows go, and the columns that are padding in all others.

        Returns:
            Which row stands where now.
        """
        order = list(range(len(self) - len(gone)))
        movers = [row for row in range(len(order), len(self)) if row not in gone]
        moved = list(zip(movers, (row for row in order if row in gone), strict=True))
        for source, target in moved:
            order[target] = source
        self.lengths = [self.lengths[row] for row in order]
        for layer in self._layers:
            layer.keep(len(order), self.columns, moved)
        return order

    @torch.inference_mode()
    def join(self, other: Rows) -> None:
        """Takes in the rows of another batch, behind its own; the other is not to be used after."""
        if not self.lengths:
            self._cache = other._cache
        else:
            pairs = list(zip(self._layers, other._layers, strict=True))
            for mine, theirs in pairs:
                mine.make_room(theirs)
            for mine, theirs in pairs:
                mine.join(theirs)
        self.lengths = [*self.lengths, *other.lengths]

    @torch.inference_mode()
    def beginnings(self, lengths: Sequence[int]) -> Rows:
        """New rows, each with the first tokens of this one row, so many as said."""
        columns = torch.arange(max(lengths))
        blank = len(columns) - torch.tensor(lengths).unsqueeze(1)
        return self._picked([0] * len(lengths), (columns - blank).clamp(min=0), lengths)

    @torch.inference_mode()
    def repeated(self, order: Sequence[int]) -> Rows:
        """New rows, which are these in another order, and some of them several times."""
        columns = torch.arange(self.columns).expand(len(order), -1)
        return self._picked(order, columns, [self.lengths[row] for row in order])

    def _picked(self, order: Sequence[int], columns: torch.Tensor, lengths: Sequence[int]) -> Rows:
        picked = Rows(self._model)
        picked.lengths = list(lengths)
        picked._cache.layers = [
            layer.picked(torch.tensor(order, device=layer.device), columns.to(layer.device))
            for layer in self._layers
        ]
        return picked

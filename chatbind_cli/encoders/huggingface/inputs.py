"""Films, sounds and texts as models of transformers with processors of their own want them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from chatbind_cli.errors import WeightsError
from chatbind_cli.media.guard import IMPORTING
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import MediaSource
from chatbind_cli.model.pretrained import one_line

AS_ARRAYS: dict[str, Any] = {
    "return_tensors": "pt",
    "input_data_format": "channels_last",
    "device": "cpu",
}
"""What processors of pictures and films are told, whatever their files say."""
MOST_FRAMES = 64
"""Of a film, whatever `--fps` and a processor that takes any number say."""

MOST_NUMBERS = 1 << 26
"""Of a medium's tensor: 256 MiB."""

LEAST_RATE_HZ = 1000

WORK = 10
"""Bytes a pixel on the way to a processor's tensor."""


def spread(total: int, count: int) -> list[int]:
    """So many of `total` frames, spread evenly from the first to the last."""
    if count < 2:
        return [0]
    return [number * (total - 1) // (count - 1) for number in range(count)]


def read_sound(
    source: MediaSource, options: MediaOptions, rate_hz: int, *, most_seconds: float
) -> torch.Tensor:
    """Reads the beginning of a sound, or of the part of it that `options` name.

    Returns:
        float32 [samples] in [-1, 1], at least one, of the first channel.

    Raises:
        MediaError: it cannot be read.
    """
    with IMPORTING:
        from chatbind_cli.media.audio import read_stretches  # noqa: PLC0415

    def cut(total: int) -> list[tuple[int, int]]:
        start, end = options.stretch(total / rate_hz, source.name)
        begin = int(start * rate_hz)
        longest = begin + int(most_seconds * rate_hz)
        return [(begin, max(min(int(end * rate_hz), total, longest), begin + 1))]

    return read_stretches(source, rate_hz, cut, longest_s=most_seconds)[0]


def text_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, most: int, words: int
) -> torch.Tensor:
    """The ids of texts, int64 [texts, longest]; shorter ones are filled up at the end.

    Args:
        tokenizer: the repository's.
        texts: of any length.
        most: ids of a text; longer ones are cut.
        words: size of the model's vocabulary.

    Raises:
        CheckpointError: the tokenizer breaks over one.
        WeightsError: it gives no ids, or some that the model does not know.
    """
    cut = min(most, tokenizer.model_max_length)
    with one_line("its tokenizer breaks over a text", tokenizer.name_or_path):
        found = tokenizer(list(texts), truncation=True, max_length=cut)["input_ids"]
    longest = max(map(len, found))
    ids = torch.full((len(found), longest), tokenizer.pad_token_id or 0)
    for row, one in zip(ids, found, strict=True):
        row[: len(one)] = torch.tensor(one, dtype=torch.int64)
    if min(map(len, found)) < 1 or not 0 <= int(ids.min()) <= int(ids.max()) < words:
        raise WeightsError("has a tokenizer that is not this model's", where=tokenizer.name_or_path)
    return ids


def mask_of(ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Which of these ids are a text's, int64 of the same shape: not those that fill up its end."""
    said = (ids != (tokenizer.pad_token_id or 0)).long()
    return said.flip(-1).cummax(dim=-1).values.flip(-1)

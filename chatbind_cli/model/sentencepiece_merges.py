"""SentencePiece's merge order for tokenizers that run on the `tokenizers` library.

transformers builds the merges of a bare `tokenizer.model` in the order of token ids. SentencePiece
goes by the scores of its pieces, and gives runs of spaces the lowest: "a  b" is `▁a ▁ ▁b` to the
weights, not `▁a ▁▁ b`. This module puts the merges into the order of the scores.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from chatbind_cli.errors import CheckpointError
from chatbind_cli.weights.json_file import MOST_BYTES

_LONGEST_PIECE = 512  # characters; every place to cut one is looked at


def with_scored_merges(
    tokenizer: PreTrainedTokenizerBase, model_file: Path
) -> PreTrainedTokenizerBase:
    """The same tokenizer with SentencePiece's own merges.

    Args:
        tokenizer: loaded from the folder in which `model_file` lies.
        model_file: `tokenizer.model`.

    Returns:
        A new tokenizer; the same one if it is not a byte-pair encoding of these pieces.

    Raises:
        CheckpointError: the file is no SentencePiece model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer
    state = json.loads(backend.to_str())
    pieces = read_pieces(model_file)
    vocabulary = {pieces.IdToPiece(i): i for i in range(pieces.GetPieceSize())}
    if state["model"].get("type") != "BPE" or not _same_ids(state["model"]["vocab"], vocabulary):
        return tokenizer
    merges = _merges(pieces, vocabulary)
    if merges == [tuple(pair) for pair in state["model"]["merges"]]:
        return tokenizer
    state["model"]["merges"] = merges
    options = {
        key: value
        for key, value in tokenizer.init_kwargs.items()
        if key not in ("vocab", "merges", "vocab_file", "tokenizer_file", "tokenizer_object")
    }
    return type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **options)


def read_pieces(model_file: Path) -> SentencePieceProcessor:
    """A `tokenizer.model`, before anybody cuts its pieces at every place.

    Raises:
        CheckpointError: the file is no SentencePiece model, or has a piece longer than any.
    """
    try:
        if model_file.stat().st_size > MOST_BYTES:
            raise OSError("too large")
        pieces = SentencePieceProcessor(model_file=str(model_file))
    except (OSError, RuntimeError) as error:
        raise CheckpointError("not a SentencePiece model", where=str(model_file)) from error
    if any(len(pieces.IdToPiece(i)) > _LONGEST_PIECE for i in range(pieces.GetPieceSize())):
        raise CheckpointError("has a piece longer than any", where=str(model_file))
    return pieces


def _same_ids(own: dict[str, int], vocabulary: dict[str, int]) -> bool:
    return all(own.get(piece) == index for piece, index in vocabulary.items())


def _merges(pieces: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs that join to a piece, best score first.

    Equal scores occur among runs of spaces only; there SentencePiece takes the leftmost pair, so a
    run grows from its left end: the pair with the longer left part goes first.
    """
    ranked: list[tuple[float, int, str, str]] = []
    for piece, index in vocabulary.items():
        if pieces.IsControl(index) or pieces.IsUnknown(index) or pieces.IsByte(index):
            continue
        score = pieces.GetScore(index)
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-score, -len(left), left, right))
    ranked.sort(key=lambda pair: pair[:2])
    return [(left, right) for _, _, left, right in ranked]

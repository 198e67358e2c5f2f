"""Tokenizers: the tokens that ChatBind adds, and text to ids the way the weights saw it.

`TextCodec` has one path for training and asking. Published ChatBind weights were trained with a
SentencePiece tokenizer that reads every stretch between added tokens as a text of its own; the
codec does the same on any tokenizer, so its ids equal those of the reference's training code.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import AddedToken, AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from chatbind_cli.checkpoints.json_file import MOST_BYTES
from chatbind_cli.checkpoints.projector_file import MEDIA_TOKENS
from chatbind_cli.errors import CheckpointError
from chatbind_cli.model.config import ChatBindConfig
from chatbind_cli.model.pretrained import one_line, open_tokenizer

_BREAKS = "its tokenizer breaks over a text"
_LONGEST_PIECE = 512  # characters of SentencePiece's; every place to cut one is looked at

# a prompt style's own texts come first, and again with every sample
_MOST_KNOWN, _LONGEST_KNOWN = 1000, 2000


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    A folder with nothing but a `tokenizer.model` is LLaMA's. Where that file is, its scores decide
    how words are cut.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    folder = Path(path)
    model_file = folder / "tokenizer.model"
    if not model_file.is_file():
        return open_tokenizer(path)
    # read first: transformers looks at all ways to cut a piece, however long it is
    pieces = _read_pieces(model_file)
    told = any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    tokenizer = open_tokenizer(path, AutoTokenizer if told else LlamaTokenizer)
    return _with_scored_merges(tokenizer, pieces)


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    *,
    use_start_end: bool = True,
    pad_token: str | None = None,
) -> None:
    """Adds the tokens for media, and a padding token if there is none.

    The order of ids is the published one: padding (if added), `<im_patch>`, `<im_start>`,
    `<im_end>`. Tokens that are there already are left alone. Without a `pad_token` to add, the
    unknown or end-of-text token doubles as padding.
    """
    if tokenizer.pad_token is None:
        if pad_token is not None:
            tokenizer.add_special_tokens({"pad_token": AddedToken(pad_token, special=True)})
        else:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    known = tokenizer.get_vocab()
    names = [f"<{name}>" for name in MEDIA_TOKENS[: 3 if use_start_end else 1]]
    tokenizer.add_tokens(
        [AddedToken(name, normalized=False, special=True) for name in names if name not in known],
        special_tokens=True,
    )


def media_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The ids of the media tokens (None where missing), by the names of their config fields."""
    vocabulary = tokenizer.get_vocab()
    return {f"{name}_id": vocabulary.get(f"<{name}>") for name in MEDIA_TOKENS}


def media_rows(config: ChatBindConfig) -> dict[str, int]:
    """The rows of the word embeddings that stand for media tokens, under their short names."""
    names = MEDIA_TOKENS[: 3 if config.use_start_end else 1]
    ids = {name: getattr(config, f"{name}_id") for name in names}
    return {name: index for name, index in ids.items() if index is not None}


class TextCodec:
    """Text to token ids, a stretch at a time.

    Args:
        tokenizer: any tokenizer of transformers that runs on the `tokenizers` library.

    Attributes:
        bos: ids that every text begins with (empty for tokenizers without such a token).
        eos: id of the end-of-text token.
        marks_start: whether the tokenizer marks the start of a text as it marks a word
            (SentencePiece's "dummy prefix"). Such tokenizers lose the white space beside media.

    Raises:
        CheckpointError: the tokenizer is of another kind, or has no end-of-text token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise CheckpointError(
                f"{type(tokenizer).__name__} does not run on the `tokenizers` library",
                hint="save it as tokenizer.json first",
            )
        if tokenizer.eos_token_id is None:
            raise CheckpointError("the tokenizer has no end-of-text token")
        self._where = tokenizer.name_or_path or "the tokenizer"
        self.eos: int = tokenizer.eos_token_id
        with one_line(_BREAKS, self._where):
            state, self.marks_start = _without_start_mark(json.loads(backend.to_str()))
            self._state = json.dumps(state)
            self._known: dict[tuple[str, bool], tuple[int, ...]] = {}
            self._plain = Tokenizer.from_str(self._state)
            self._plain.encode_special_tokens = True  # "</s>" in a user's text is four characters
            self.bos = self._bos(tokenizer)

    def plain(self, text: str, *, at_start: bool) -> list[int]:
        """Ids of text in which no control token counts.

        Args:
            text: what to encode.
            at_start: whether it begins a stretch (at the start, or after a control token).
        """
        mark = " " if at_start and self.marks_start and text else ""
        return self._ids(self._plain, mark + text)

    def control(self, text: str, *, at_start: bool) -> list[int]:
        """Ids of a template's own text, in which control tokens count."""
        ids = self._ids(self._control, text)
        if not (at_start and self.marks_start and ids):
            return ids
        if ids[0] in self._control.get_added_tokens_decoder():
            return ids
        return self._ids(self._control, " " + text)

    def _ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        known = self._known.get((text, tokenizer is self._plain))
        if known is not None:
            return list(known)
        try:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        except BaseException:  # the library panics with what is no `Exception`
            with one_line(_BREAKS, self._where):
                raise
        if len(self._known) < _MOST_KNOWN and len(text) < _LONGEST_KNOWN:
            self._known[text, tokenizer is self._plain] = tuple(ids)
        return ids

    @cached_property
    def _control(self) -> Tokenizer:
        """Made when a style first needs it: parsing a large vocabulary takes a while."""
        return Tokenizer.from_str(self._state)

    def _bos(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """What the tokenizer puts before a text.

        A LLaMA folder without tokenizer_config.json does not say that its texts begin with `<s>`,
        but its weights saw them so; hence the rule for SentencePiece-like tokenizers.
        """
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        full = tokenizer("a", add_special_tokens=True)["input_ids"]
        places = range(len(full) - len(bare) + 1)
        before = next((n for n in places if full[n : n + len(bare)] == bare), 0)
        if before:
            return list(full[:before])
        if self.marks_start and tokenizer.bos_token_id is not None:
            return [tokenizer.bos_token_id]
        return []


def _without_start_mark(state: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """A serialised tokenizer that adds nothing to a text, and whether it added something before."""
    state = {**state, "post_processor": None, "padding": None, "truncation": None}
    found = False

    def visit(part: Any) -> Any:
        nonlocal found
        if not isinstance(part, dict):
            return part
        kind = part.get("type")
        if kind == "Sequence":
            key = "normalizers" if "normalizers" in part else "pretokenizers"
            return {**part, key: [p for p in map(visit, part[key]) if p is not None]}
        if kind == "Prepend":
            found = True
            return None
        if kind == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            found = True
            return {**part, "prepend_scheme": "never"}
        if kind == "ByteLevel" and part.get("add_prefix_space"):
            found = True
            return {**part, "add_prefix_space": False}
        return part

    state["normalizer"] = visit(state.get("normalizer"))
    state["pre_tokenizer"] = visit(state.get("pre_tokenizer"))
    return state, found


def _read_pieces(model_file: Path) -> SentencePieceProcessor:
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


def _with_scored_merges(
    tokenizer: PreTrainedTokenizerBase, pieces: SentencePieceProcessor
) -> PreTrainedTokenizerBase:
    """The same tokenizer with SentencePiece's own merges.

    transformers builds the merges of a bare `tokenizer.model` in the order of token ids.
    SentencePiece goes by the scores of its pieces, and gives runs of spaces the lowest: "a  b" is
    `▁a ▁ ▁b` to the weights, not `▁a ▁▁ b`.

    Returns:
        A new tokenizer; the same one if it is not a byte-pair encoding of these pieces.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer
    state = json.loads(backend.to_str())
    model = state["model"]
    vocabulary = {pieces.IdToPiece(i): i for i in range(pieces.GetPieceSize())}
    if model.get("type") != "BPE" or not vocabulary.items() <= model["vocab"].items():
        return tokenizer
    merges = _merges(pieces, vocabulary)
    if merges == [tuple(pair) for pair in model["merges"]]:
        return tokenizer
    model["merges"] = merges
    files = ("vocab", "merges", "vocab_file", "tokenizer_file", "tokenizer_object")
    options = {key: value for key, value in tokenizer.init_kwargs.items() if key not in files}
    return type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **options)


def _merges(pieces: SentencePieceProcessor, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
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

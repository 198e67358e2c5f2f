"""Tokenizers: the tokens that ChatBind adds, and text to ids the way the weights saw it.

`TextCodec` has one path for training and asking. Published ChatBind weights were trained with a
SentencePiece tokenizer that reads every stretch between added tokens as a text of its own; the
codec does the same on any tokenizer, so its ids equal those of the reference's training code.
Prompt styles and media are not known here.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AddedToken, AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from chatbind_cli.errors import CheckpointError
from chatbind_cli.model.config import ChatBindConfig
from chatbind_cli.model.pretrained import one_line, open_tokenizer
from chatbind_cli.model.sentencepiece_merges import read_pieces, with_scored_merges

IM_PATCH = "<im_patch>"
IM_START = "<im_start>"
IM_END = "<im_end>"
_BREAKS = "its tokenizer breaks over a text"


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder (or hub name).

    A folder with nothing but a `tokenizer.model` is LLaMA's. Where that file is, its scores decide
    how words are cut.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    folder = Path(path)
    model_file = folder / "tokenizer.model"
    told = any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    kind = LlamaTokenizer if model_file.is_file() and not told else AutoTokenizer
    if model_file.is_file():
        read_pieces(model_file)  # transformers looks at all ways to cut one, however long it is
    tokenizer = open_tokenizer(path, kind)
    return with_scored_merges(tokenizer, model_file) if model_file.is_file() else tokenizer


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    *,
    use_start_end: bool = True,
    pad_token: str | None = None,
) -> int:
    """Adds the tokens for media, and a padding token if there is none.

    The order of ids is the published one: padding (if added), `<im_patch>`, `<im_start>`,
    `<im_end>`. Tokens that are there already are left alone.

    Args:
        tokenizer: changed in place.
        use_start_end: whether `<im_start>` and `<im_end>` are wanted.
        pad_token: the padding token to add where the tokenizer has none; without one, the unknown
            or end-of-text token doubles as padding.

    Returns:
        How many tokens were added.
    """
    before = len(tokenizer)
    if tokenizer.pad_token is None:
        if pad_token is not None:
            tokenizer.add_special_tokens({"pad_token": AddedToken(pad_token, special=True)})
        else:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    names = [IM_PATCH, IM_START, IM_END] if use_start_end else [IM_PATCH]
    known = tokenizer.get_vocab()
    tokenizer.add_tokens(
        [AddedToken(name, normalized=False, special=True) for name in names if name not in known],
        special_tokens=True,
    )
    return len(tokenizer) - before


def media_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The ids of the media tokens (None where missing), by the names of their config fields."""
    vocabulary = tokenizer.get_vocab()
    names = {"im_patch_id": IM_PATCH, "im_start_id": IM_START, "im_end_id": IM_END}
    return {field: vocabulary.get(name) for field, name in names.items()}


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
        with one_line(_BREAKS, self._where):
            return self._plain.encode(mark + text, add_special_tokens=False).ids

    def control(self, text: str, *, at_start: bool) -> list[int]:
        """Ids of a template's own text, in which control tokens count."""
        with one_line(_BREAKS, self._where):
            encoding = self._control.encode(text, add_special_tokens=False)
            if at_start and self.marks_start and encoding.ids:
                added = self._control.get_added_tokens_decoder()
                if encoding.ids[0] not in added:
                    return self._control.encode(" " + text, add_special_tokens=False).ids
            return encoding.ids

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
        for length in range(len(full) - len(bare) + 1):
            if full[length : length + len(bare)] == bare:
                if length:
                    return list(full[:length])
                break
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


def media_rows(config: ChatBindConfig) -> dict[str, int]:
    """The rows of the word embeddings that stand for media tokens, under their short names."""
    ids = {
        "im_patch": config.im_patch_id,
        "im_start": config.im_start_id if config.use_start_end else None,
        "im_end": config.im_end_id if config.use_start_end else None,
    }
    return {name: index for name, index in ids.items() if index is not None}

"""Prompt styles: how a conversation is written down for the language model.

A style turns turns into pieces, each with the mark whether the model is to learn it, and knows
nothing of token ids. Training and asking use the same pieces, so a model is asked in the form that
it was trained in. The exact strings of the published styles lie in `prompt_styles.json`: they are a
wire format, not prose.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from chatbind_cli.errors import CheckpointError, UsageError
from chatbind_cli.media.medium import Medium
from chatbind_cli.model.chat_template import render_marked
from chatbind_cli.model.turns import GPT, HUMAN, Turn

CHAT = "chat"

_SYSTEM = "system"
_TWO_PAIRS = ["user", "assistant", "user", "assistant"]
_TEMPLATE_ROLES = {_SYSTEM: "system", HUMAN: "user", GPT: "assistant"}

STYLE_BY_VERSION = {"v0": "v0", "v1": "vicuna_v1_1", "mpt": "mpt_multimodal"}
"""LLaVA's `--version` values, and the style in which its scripts then train."""

PLAIN = "plain"  # a user's words or a style's own: no control token is ever read from them
CONTROL = "control"  # a template's own text, whose control tokens count
EOS = "eos"  # the tokenizer's end-of-text token
MEDIA = "media"


class Piece(NamedTuple):
    """A stretch of a prompt; `target`: whether the model learns to write it."""

    kind: str
    text: str = ""
    target: bool = False
    medium: Medium | None = None


@dataclass(frozen=True, kw_only=True)
class PromptStyle:
    """The fixed strings of a style, in the order of their use.

    `system_open` `system` `system_close`; then, turn by turn, `user_open` question `user_close`
    and `answer_open` `answer_lead` answer `answer_close`; then the tail. The model learns lead,
    answer and close. A prompt for inference ends with `answer_open`.

    Args:
        name: what `--prompt-style` calls it.
        system_open: what stands before the system text.
        system: the system text, where nobody gives another.
        system_close: what stands after it; seed turns, too, where the style has them.
        user_open: what stands before a question.
        user_close: what stands after it.
        answer_open: what stands before an answer.
        answer_lead: white space between that and the answer's first word.
        answer_close: what ends an answer.
        ends_with_eos: whether the end-of-text token ends an answer.
        tail: what follows the last answer of a training sample.
        stop: text that ends generation, if it is not the end-of-text token.
        control_tokens: whether the strings hold control tokens such as `<|im_end|>`.
        may_start_with_answer: whether an answer may come first; else such a turn is left out.
        pad_token: the padding token that the published tokenizers of this style add.
    """

    name: str
    system_open: str = ""
    system: str = ""
    system_close: str = ""
    user_open: str = ""
    user_close: str = ""
    answer_open: str = ""
    answer_lead: str = ""
    answer_close: str = ""
    ends_with_eos: bool = False
    tail: str = ""
    stop: str | None = None
    control_tokens: bool = False
    may_start_with_answer: bool = False
    pad_token: str | None = None

    def pieces(
        self, turns: Sequence[Turn], *, tokenizer: Any = None, system: str | None = None
    ) -> list[Piece]:
        """The pieces of a conversation: of questions and answers in turn.

        If the last is a question, they are a prompt that asks for the answer; else a training
        sample. Neighbours of the same kind and mark are not merged. Only the style `chat` needs
        the tokenizer. A `system` text takes the place of the style's own.
        """
        kind = CONTROL if self.control_tokens else PLAIN
        told = Piece(kind, self.system) if system is None else Piece(PLAIN, system)
        pieces = [Piece(kind, self.system_open), told, Piece(kind, self.system_close)]
        for turn in self._usable(turns):
            if turn.role == HUMAN:
                pieces += [Piece(kind, self.user_open), *content_pieces(turn)]
                pieces.append(Piece(kind, self.user_close))
                continue
            pieces.append(Piece(kind, self.answer_open))
            # an empty answer is the end token alone, which then follows the opening directly
            if turn.content or not self.ends_with_eos:
                pieces.append(Piece(PLAIN, self.answer_lead, target=True))
            pieces += content_pieces(turn, target=True)
            pieces.append(Piece(kind, self.answer_close, target=True))
            if self.ends_with_eos:
                pieces.append(Piece(EOS, target=True))
        asks = bool(turns) and turns[-1].role == HUMAN
        pieces.append(Piece(kind, self.answer_open if asks else self.tail))
        return [p for p in pieces if p.text or p.kind in (EOS, MEDIA)]

    def _usable(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        skip_first = turns and turns[0].role != HUMAN and not self.may_start_with_answer
        return turns[1:] if skip_first else turns


class ChatStyle(PromptStyle):
    """The language model's own chat template, as its tokenizer carries it.

    Templates write an answer differently where it is the last, where it is history and where it is
    yet to come: some put an empty `<think>` block before the last alone. A training sample has all
    of its answers learned, so each is written as the last; and so is the one that is asked for.
    """

    def pieces(
        self, turns: Sequence[Turn], *, tokenizer: Any = None, system: str | None = None
    ) -> list[Piece]:
        """See `PromptStyle.pieces`.

        Raises:
            CheckpointError: the tokenizer has no chat template, or it changes its contents, or
                knows no system text.
        """
        turns = self._usable(turns)
        asks = bool(turns) and turns[-1].role == HUMAN
        if system is not None:
            _check_system(tokenizer)
            turns = [Turn(_SYSTEM, (system,)), *turns]
        roles = [_TEMPLATE_ROLES[turn.role] for turn in turns] + ["assistant"] * asks
        before: list[str] = []
        end = ""
        for last in (index for index, role in enumerate(roles) if role == "assistant"):
            *texts, end = _around(*render_marked(tokenizer, roles[: last + 1]))
            before += texts[len(before) :]
        pieces: list[Piece] = []
        answered = False
        for turn, text in zip(turns, before, strict=not asks):
            pieces += _template_text(text, tokenizer, closes_answer=answered)
            answered = turn.role == GPT
            pieces += content_pieces(turn, target=answered)
        pieces += _template_text(before[-1] if asks else end, tokenizer, closes_answer=not asks)
        return _spaces_to_words(pieces)


def content_pieces(turn: Turn, *, target: bool = False) -> list[Piece]:
    """A turn's content, as pieces of plain text and media."""
    return [
        Piece(MEDIA, medium=part) if isinstance(part, Medium) else Piece(PLAIN, part, target)
        for part in turn.content
    ]


def _check_system(tokenizer: Any) -> None:
    """Refuses a chat template that has no room for a system text.

    Raises:
        CheckpointError: it has none, or none where it would stay in its place.
    """
    try:
        _around(*render_marked(tokenizer, ["system", *_TWO_PAIRS]))
    except CheckpointError as error:
        _around(*render_marked(tokenizer, _TWO_PAIRS))  # says what is wrong beside that
        raise CheckpointError(
            "the tokenizer's chat template takes no system text", where=error.where
        ) from error


def _around(rendered: str, marks: Sequence[str]) -> list[str]:
    """What stands before each of the marks, and after the last."""
    texts = []
    for mark in marks:
        before, found, rendered = rendered.partition(mark)
        if not found:
            raise CheckpointError(
                "the tokenizer's chat template drops or reorders turns",
                hint="choose another --prompt-style",
            )
        texts.append(before)
    return [*texts, rendered]


def _template_text(text: str, tokenizer: Any, *, closes_answer: bool) -> list[Piece]:
    """A template's own text; after an answer, up to its first control token it is to be learned."""
    if not closes_answer:
        return [Piece(CONTROL, text)] if text else []
    ends = [
        text.index(token) + len(token) for token in tokenizer.all_special_tokens if token in text
    ]
    if not ends:
        # a template in plain words: the end-of-text token is the only end a model can learn
        return [Piece(EOS, target=True), *([Piece(CONTROL, text)] if text.strip() else [])]
    end = min(ends)
    pieces = [Piece(CONTROL, text[:end], target=True)]
    return pieces + ([Piece(CONTROL, text[end:])] if text[end:] else [])


def _spaces_to_words(pieces: list[Piece]) -> list[Piece]:
    """Moves the spaces at the end of a template's text to the words after it.

    Tokenizers join a space to the word that follows; at the end of a prompt the model writes it.
    """
    moved: list[Piece] = []
    carry = ""
    for piece in pieces:
        text = carry + piece.text
        carry = ""
        if piece.kind == CONTROL and not piece.target:
            carry = " " * (len(text) - len(text.rstrip(" ")))
            text = text.rstrip(" ")
        if text or piece.kind in (EOS, MEDIA):
            moved.append(Piece(piece.kind, text, piece.target, piece.medium))
    return moved


@cache
def styles() -> dict[str, PromptStyle]:
    """All prompt styles by name."""
    text = resources.files("chatbind_cli.model").joinpath("prompt_styles.json").read_text("utf-8")
    published = {name: PromptStyle(name=name, **said) for name, said in json.loads(text).items()}
    return {**published, CHAT: ChatStyle(name=CHAT)}


def get_style(name: str) -> PromptStyle:
    """The prompt style of a name.

    Raises:
        UsageError: there is none.
    """
    if name not in styles():
        raise UsageError(
            f"there is no prompt style {name!r}", hint=f"choose one of {', '.join(styles())}"
        )
    return styles()[name]

"""Conversations and questions to token ids, and the labels that go with them.

Ids and labels grow together, piece by piece, so a label can never drift from its token; and the
ids of a prompt are the first ids of the training sample with the same turns. Files, embeddings and
tensors are not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from chatbind_cli.data.conversations import Conversation
from chatbind_cli.errors import RecordError
from chatbind_cli.media.medium import Medium
from chatbind_cli.model.config import ChatBindConfig
from chatbind_cli.model.label_loss import IGNORE_INDEX
from chatbind_cli.model.prompts import CONTROL, EOS, MEDIA, Piece, PromptStyle, get_style
from chatbind_cli.model.tokenizer import TextCodec
from chatbind_cli.model.turns import HUMAN, Turn, answer


@dataclass(slots=True)
class TokenizedSample:
    """A conversation as token ids.

    Args:
        input_ids: token ids.
        labels: the same length; `IGNORE_INDEX` or the token id.
        media: the media whose tokens are in `input_ids`, in order.
        cut: how many more tokens the conversation has.
    """

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    media: tuple[Medium, ...] = ()
    cut: int = 0


class PromptEncoder:
    """Writes conversations down as token ids in one prompt style.

    Args:
        tokenizer: with the media tokens added.
        config: the model's configuration: media token ids and counts, and the prompt style.
        style: a style (or its name) in place of the configuration's.

    Attributes:
        style: the prompt style in use.
        stop_strings: texts that end an answer, for styles that do not end it with a token.
        stop_token_ids: token ids that end an answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: ChatBindConfig,
        style: str | PromptStyle | None = None,
    ) -> None:
        style = config.prompt_style if style is None else style
        self.style = get_style(style) if isinstance(style, str) else style
        self._tokenizer = tokenizer
        self._codec = TextCodec(tokenizer)
        self._medium_ids = config.medium_ids()
        self.stop_token_ids = self._find_stop_tokens()
        self.stop_strings: tuple[str, ...] = ()
        if self.style.stop is not None and len(self.stop_token_ids) == 1:
            self.stop_strings = (self.style.stop,)

    def conversation(
        self, conversation: Conversation, max_length: int | None = None
    ) -> TokenizedSample:
        """A training sample.

        Args:
            conversation: ends with an answer.
            max_length: longer samples are cut there. The tokens of a medium are never torn: a cut
                inside them moves before them. Media beyond the cut leave the sample.

        Raises:
            RecordError: it does not end with an answer.
        """
        if not conversation.turns or conversation.turns[-1].role == HUMAN:
            raise RecordError("the conversation has no answer to learn", where=conversation.where)
        sample, spans = self._encode(conversation.turns)
        if max_length is not None and len(sample.input_ids) > max_length:
            torn = (start for start, end in spans if start < max_length < end)
            length = next(torn, max_length)
            kept = sum(end <= length for _, end in spans)
            sample = TokenizedSample(
                sample.input_ids[:length],
                sample.labels[:length],
                sample.media[:kept],
                cut=len(sample.input_ids) - length,
            )
        return sample

    def prompt(self, turns: Sequence[Turn], system: str | None = None) -> TokenizedSample:
        """A prompt that asks for the answer to the last turn.

        Args:
            turns: questions and answers in turn, the last a question (see `turns.question`).
            system: what tells the model how to answer, in place of the style's own system text.

        Raises:
            RecordError: the last turn is not a question.
            CheckpointError: the model's chat template takes no system text.
        """
        _check_asks(turns)
        sample, _ = self._encode(turns, system)
        return sample

    def answer(self, turns: Sequence[Turn], text: str, system: str | None = None) -> list[int]:
        """The token ids of an answer behind the prompt of `turns`, as training would learn them.

        With what ends an answer: to write them is to answer that, and nothing more.

        Raises:
            RecordError: the last turn is not a question.
        """
        _check_asks(turns)
        pieces = self._pieces([*turns, answer(text)], system)
        end = 1 + max(index for index, piece in enumerate(pieces) if piece.target)
        start = 1 + max(index for index, piece in enumerate(pieces[:end]) if not piece.target)
        ids: list[int] = []
        for before, piece in pairwise(pieces[start - 1 : end]):
            ids += self._ids(piece, at_start=_starts_anew(before))
        return ids

    def _encode(
        self, turns: Sequence[Turn], system: str | None = None
    ) -> tuple[TokenizedSample, list[tuple[int, int]]]:
        """The whole sample, and where each medium's tokens start and end in it."""
        pieces = self._pieces(turns, system)
        sample = TokenizedSample()
        media: list[Medium] = []
        spans: list[tuple[int, int]] = []
        if not (pieces and pieces[0].kind == CONTROL and self._begins_with_bos(pieces[0].text)):
            self._grow(sample, self._codec.bos, target=False)
        at_start = True
        for piece in pieces:
            ids = self._ids(piece, at_start=at_start)
            if piece.medium is not None:
                media.append(piece.medium)
                spans.append((len(sample.input_ids), len(sample.input_ids) + len(ids)))
            self._grow(sample, ids, target=piece.target)
            at_start = _starts_anew(piece)
        sample.media = tuple(media)
        return sample, spans

    def _pieces(self, turns: Sequence[Turn], system: str | None = None) -> list[Piece]:
        pieces = _merged(self.style.pieces(turns, tokenizer=self._tokenizer, system=system))
        return _without_space_at_media(pieces) if self._codec.marks_start else pieces

    def _ids(self, piece: Piece, *, at_start: bool) -> Sequence[int]:
        if piece.kind == MEDIA:
            return self._medium_ids
        if piece.kind == EOS:
            return [self._codec.eos]
        if piece.kind == CONTROL:
            return self._codec.control(piece.text, at_start=at_start)
        return self._codec.plain(piece.text, at_start=at_start)

    @staticmethod
    def _grow(sample: TokenizedSample, ids: Sequence[int], *, target: bool) -> None:
        sample.input_ids += ids
        sample.labels += ids if target else [IGNORE_INDEX] * len(ids)

    def _begins_with_bos(self, text: str) -> bool:
        token = self._tokenizer.bos_token
        return bool(token) and text.startswith(str(token))

    def _find_stop_tokens(self) -> tuple[int, ...]:
        """End-of-text, and the control token with which the style ends an answer, if it has one."""
        stops = [self._codec.eos]
        turns = (Turn(HUMAN, ("a",)), Turn("gpt", ("b",)))
        for piece in self.style.pieces(turns, tokenizer=self._tokenizer):
            if piece.kind == CONTROL and piece.target:
                ids = self._codec.control(piece.text, at_start=False)
                if ids and ids[-1] in self._tokenizer.all_special_ids:
                    stops.append(ids[-1])
        return tuple(dict.fromkeys(stops))


def _check_asks(turns: Sequence[Turn]) -> None:
    if not turns or turns[-1].role != HUMAN:
        raise RecordError("a prompt must end with a question")


def _starts_anew(before: Piece) -> bool:
    """Whether what follows a piece is the start of a text to the tokenizer."""
    return before.kind in (EOS, MEDIA)


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbouring texts of the same kind and mark as one, so that their tokens may join."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if (
            last is not None
            and piece.kind not in (EOS, MEDIA)
            and (last.kind, last.target) == (piece.kind, piece.target)
        ):
            merged[-1] = Piece(last.kind, last.text + piece.text, last.target)
        else:
            merged.append(piece)
    return merged


def _without_space_at_media(pieces: Sequence[Piece]) -> list[Piece]:
    """Drops white space on either side of media, as the reference's training tokenizer does."""
    stripped: list[Piece] = []
    for index, piece in enumerate(pieces):
        text = piece.text
        if index and pieces[index - 1].kind == MEDIA:
            text = text.lstrip()
        if index + 1 < len(pieces) and pieces[index + 1].kind == MEDIA:
            text = text.rstrip()
        if text or piece.kind in (EOS, MEDIA):
            stripped.append(Piece(piece.kind, text, piece.target, piece.medium))
    return stripped

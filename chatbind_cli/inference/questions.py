"""Questions: from a file, a pipe or a program."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from chatbind_cli.errors import ChatBindError
from chatbind_cli.files import own_stream
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.jsonl import Line, Record, read_lines
from chatbind_cli.media.medium import Medium

if TYPE_CHECKING:
    from chatbind_cli.data.tokens import TokenizedSample
    from chatbind_cli.model.turns import Turn

_MOST_COUNTED = 1 << 30
"""Bytes that are read only to tell how long it will take."""


class Listener(Protocol):
    """Whoever waits for an answer while others are made beside it.

    It is called from the engine's threads, between two tokens, and must not wait for anything.
    """

    @property
    def gone(self) -> bool:
        """Whether nobody waits any more: then the answer is given up."""

    def grown(self, sample: int, text: str) -> None:
        """Hears the beginning of an answer, as far as no later token can change it.

        Args:
            sample: which of the answers to the question, from 0.
            text: all of it so far.
        """


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A question, from its record to its prompt.

    Args:
        text: its words; placeholders such as `<image>` say where media go, else they follow.
        media: what it is about.
        mix: bring all media into one embedding (their weighted sum, at norm 1), which takes the
            place of the first; else each has its own.
        system: what tells the model how to answer, in place of its prompt style's own text.
        earlier: roles and texts of what was said before, with placeholders for its media, which
            are the first of `media`.
        turns: all that was said, the question last, where it is known which of its words are media
            (those of `media`, in order); in place of `text` and `earlier`, which only tell of it.
        choices: the answers to choose from, where it leaves no others.
        id: its `question_id` (or `id`), if it was a record.
        record: as it was read.
        where: what an error message calls it: file and line of a record.
        line: the number of its line, if that holds no question that goes by an id.
        problem: why it cannot be answered.
        settings: how its answer is generated, where it says that itself.
        turn: what it is in a dialogue, once its media are embedded.
        prompt: what the language model reads, from then on.
        choice_ids: the token ids of each choice behind that.
        listener: who hears of its answer while that grows.
    """

    text: str = ""
    media: tuple[Medium, ...] = ()
    mix: bool = False
    system: str | None = None
    earlier: tuple[tuple[str, str], ...] = ()
    turns: tuple[Turn, ...] = ()
    choices: tuple[str, ...] = ()
    id: str | int | None = None
    record: Record = field(default_factory=dict)
    where: str | None = None
    line: int | None = None
    problem: ChatBindError | None = None
    settings: GenerationSettings | None = None
    turn: Turn | None = None
    prompt: TokenizedSample | None = None
    choice_ids: tuple[list[int], ...] = ()
    listener: Listener | None = None

    @property
    def key(self) -> Hashable:
        """What tells it from the other questions of its file."""
        return self.id if self.line is None else ("line", self.line)

    @property
    def given_up(self) -> ChatBindError | None:
        """What becomes of it once nobody waits for its answer any more; until then None."""
        if self.listener is None or not self.listener.gone:
            return None
        return ChatBindError("given up, since nobody waits for the answer", where=self.where)


def where_of(question: Question) -> str:
    """What an error message calls a question."""
    return question.where or f"question {question.id}"


def open_questions(source: str, shard: tuple[int, int] = (1, 1)) -> Iterator[Line]:
    """The question records of a file, a named pipe or `-`, each as soon as it is there.

    Args:
        source: where they are.
        shard: I and N. Of a file the I-th of N stretches, so that the answers to all of them, one
            behind the other, are those to the file. Of a pipe, which nobody can count, every N-th
            from the I-th on.
    """
    path = Path(source)
    number, shards = shard
    if source == "-":
        # they are read in a thread, which may still wait for more when the program ends
        lines = read_lines("-", stdin=own_stream(sys.stdin.buffer))
    elif path.is_fifo():
        lines = read_lines("-", stdin=path.open("rb"))
    else:
        lines = read_lines(path)
        if shards > 1:
            return islice(lines, *_stretch(sum(1 for _ in read_lines(path)), shard))
    return islice(lines, number - 1, None, shards)


def _stretch(count: int, shard: tuple[int, int]) -> tuple[int, int]:
    number, shards = shard
    return (number - 1) * count // shards, number * count // shards


def count_questions(
    source: str, shard: tuple[int, int] = (1, 1), limit: int | None = None
) -> int | None:
    """How many questions are answered, where that is quickly told; for the progress bar."""
    path = Path(source)
    if source == "-" or not path.is_file() or path.stat().st_size > _MOST_COUNTED:
        return None
    with path.open("rb") as file:
        if file.peek(1)[:1] != b"{":
            return None
        count = sum(part.count(b"\n") for part in iter(partial(file.read, 1 << 20), b""))
    start, end = _stretch(count, shard)
    return end - start if limit is None else min(end - start, limit)

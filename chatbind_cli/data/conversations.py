"""Conversations to train on, made of LLaVA's records and of alpaca rows.

Every record is checked when it is read: roles, keys, and that placeholders and media agree.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from chatbind_cli.errors import RecordError
from chatbind_cli.media.medium import Medium, media_of_record
from chatbind_cli.media.modality import MODALITIES
from chatbind_cli.model.turns import (
    GPT,
    HUMAN,
    Turn,
    answer,
    count_placeholders,
    place_media,
)

_ROLES = {"human": HUMAN, "user": HUMAN, "gpt": GPT, "assistant": GPT}


@dataclass(frozen=True, slots=True)
class Conversation:
    """One training record.

    Args:
        id: the record's own, or its place in the file.
        turns: questions and answers in turn.
        where: file and line (or index), for error messages.
    """

    id: str | int
    turns: tuple[Turn, ...]
    where: str

    @property
    def media(self) -> tuple[Medium, ...]:
        """All media, in the order in which they are read."""
        return tuple(medium for turn in self.turns for medium in turn.media)


class Conversations:
    """Many conversations in little memory.

    They are held as records in one block of bytes and parsed one at a time: half a million Python
    objects would cost several times as much, and a copy of it in every worker process of a data
    loader, because counting references writes to them.
    """

    def __init__(self, records: Iterable[tuple[Mapping[str, Any], str]] = ()) -> None:
        self._bytes = bytearray()
        self._ends = array("Q")
        for record, where in records:
            self.append(record, where)

    def append(self, record: Mapping[str, Any], where: str) -> None:
        """Adds one at the end.

        Raises:
            RecordError: see `parse_conversation`.
        """
        parse_conversation(record, where)
        packed = json.dumps([record, where], ensure_ascii=False, separators=(",", ":"))
        # surrogatepass: JSON files in the wild hold halves of emoji
        self._bytes += packed.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Conversation:
        return parse_conversation(*self._record(index))

    def __iter__(self) -> Iterator[Conversation]:
        return map(self.__getitem__, range(len(self)))

    def sizes(self) -> list[int]:
        """About how long each is, for the order of training: the bytes of its record."""
        return [end - start for start, end in pairwise([0, *self._ends])]

    def without(self, media: Container[Medium]) -> Conversations:
        """The conversations that name none of these media."""
        kept = [i for i, one in enumerate(self) if not any(m in media for m in one.media)]
        return Conversations(map(self._record, kept))

    def _record(self, index: int) -> tuple[dict[str, Any], str]:
        start = self._ends[index - 1] if index else 0
        record, where = json.loads(
            self._bytes[start : self._ends[index]].decode("utf-8", "surrogatepass")
        )
        return record, where


def parse_conversation(record: Mapping[str, Any], where: str) -> Conversation:
    """One record as a conversation.

    Args:
        record: LLaVA's `{"id", "image", "conversations": [{"from", "value"}]}` (or the keys
            `video`, `audio`, ..., each a name or a list), or alpaca's `{"instruction", "input",
            "output"}`.
        where: file and line, for error messages.

    Raises:
        RecordError: a key is missing or of the wrong type, a role is unknown, turns do not
            alternate, or placeholders and media do not agree.
    """
    identity = record.get("id", where)
    if not isinstance(identity, str | int):
        raise RecordError(f"id must be text or a number, not {identity!r}", where=where)
    place = where if identity == where else f"{where} (id {identity})"
    media = media_of_record(record, where=place)
    if "conversations" in record:
        said = list(_said(record["conversations"], place))
    elif "instruction" in record:
        said = _alpaca(record, place)
    else:
        raise RecordError("a record has neither conversations nor instruction", where=place)
    _check_roles([role for role, _ in said], place)
    _check_counts([text for role, text in said if role == HUMAN], media, place)
    turns: list[Turn] = []
    waiting: Sequence[Medium] = media
    for role, text in said:
        if role == GPT:
            turns.append(answer(text))
        else:
            content, waiting = place_media(text, waiting)
            turns.append(Turn(HUMAN, content))
    return Conversation(identity, tuple(turns), where)


def _said(conversations: Any, where: str) -> Iterator[tuple[str, str]]:
    if not isinstance(conversations, list) or not conversations:
        raise RecordError("conversations must be a list with at least one turn", where=where)
    for number, turn in enumerate(conversations, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise RecordError(f"turn {number} has no text under value", where=where)
        role = _ROLES.get(str(turn.get("from")))
        if role is None:
            raise RecordError(
                f"turn {number} is from {turn.get('from')!r}",
                where=where,
                hint="the roles are human and gpt",
            )
        yield role, turn["value"]


def _alpaca(record: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
    fields = {key: record.get(key, "") for key in ("instruction", "input", "output")}
    for key, value in fields.items():
        if not isinstance(value, str):
            raise RecordError(f"{key} must be text", where=where)
    if "output" not in record:
        raise RecordError("a record with an instruction has no output", where=where)
    asked = "\n".join(text for text in (fields["instruction"], fields["input"]) if text)
    return [(HUMAN, asked), (GPT, fields["output"])]


def _check_roles(roles: list[str], where: str) -> None:
    for number, (before, role) in enumerate(pairwise(roles), start=2):
        if before == role:
            raise RecordError(
                f"turns {number - 1} and {number} are both from {role}",
                where=where,
                hint="human and gpt must take turns",
            )
    if roles[-1] != GPT:
        raise RecordError("the last turn is not an answer (from gpt)", where=where)


def _check_counts(questions: list[str], media: Sequence[Medium], where: str) -> None:
    placeholders = sum(map(count_placeholders, questions), Counter[str]())
    named = Counter(medium.modality for medium in media)
    for modality in MODALITIES:
        wanted, given = placeholders[modality], named[modality]
        if wanted != given:
            raise RecordError(
                f"{wanted} <{modality}> placeholder(s) in the questions, "
                f"but {given} under the key {modality}",
                where=where,
                hint="they must agree",
            )

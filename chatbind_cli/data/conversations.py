"""Conversations to train on, made of LLaVA's records and of alpaca rows.

Every record is checked when it is read: roles, keys, and that placeholders and media agree.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from chatbind_cli.data.record_file import RecordFile, Row, packed, write_rows
from chatbind_cli.errors import RecordError
from chatbind_cli.media.medium import Medium, media_of_record
from chatbind_cli.media.modality import MODALITIES
from chatbind_cli.model.turns import GPT, HUMAN, Turn, placeholders, turns_of

_MADE_AT_ONCE = 1000
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
    """Many conversations in little memory: rows of files of checked records.

    Half a million Python objects would cost several times as much, and a copy in every worker
    process of a data loader, because counting references writes to them.

    Args:
        records: each with where it stands.

    Raises:
        RecordError: see `parse_conversation`.
    """

    def __init__(self, records: Iterable[tuple[Mapping[str, Any], str]] = ()) -> None:
        sink = pa.BufferOutputStream()
        write_rows((checked_row(record, where) for record, where in records), sink)
        self._parts = [_Part.whole(RecordFile(sink.getvalue(), ""))]

    @classmethod
    def of_files(cls, files: Iterable[RecordFile]) -> Conversations:
        """The usable conversations of files, one file's after the other's."""
        return cls._of([_Part.whole(file) for file in files])

    @classmethod
    def _of(cls, parts: list[_Part]) -> Conversations:
        new = cls.__new__(cls)
        new._parts = parts
        return new

    def __len__(self) -> int:
        return sum(len(part.rows) for part in self._parts)

    def __getitem__(self, index: int) -> Conversation:
        part, at = self._find(index)
        return parse_conversation(*part.file.record(int(part.rows[at])))

    def __iter__(self) -> Iterator[Conversation]:
        return map(self.__getitem__, range(len(self)))

    def view(self, index: int) -> int:
        """Which encoder it is seen with, see `viewed`."""
        part, at = self._find(index)
        return int(part.views[at])

    def sizes(self) -> npt.NDArray[np.int64]:
        """About how long each is, for the order of training: the bytes of its record."""
        sizes = [part.file.sizes()[part.rows] for part in self._parts]
        return np.concatenate([*sizes, np.zeros(0, np.int64)])

    def seen(self, weights: Sequence[float], seed: int) -> Conversations:
        """The conversations of an epoch in which each file is seen `weight` times.

        Of 2.5, all conversations are seen twice, and a half of them, drawn by the seed, once more.
        """
        parts = zip(self._parts, weights, strict=True)
        return self._of([part.seen(w, (seed, n)) for n, (part, w) in enumerate(parts)])

    def without(self, media: Collection[Medium]) -> Conversations:
        """The conversations that name none of these media."""
        names = [_name(medium) for medium in media]
        return self._of([part.without(names) for part in self._parts])

    def viewed(self, known: Sequence[Collection[str]]) -> Conversations:
        """The conversations once with each encoder that knows one of their media, others once.

        Args:
            known: the modalities that each encoder knows.
        """
        return self._of([part.viewed(known) for part in self._parts])

    def names(self) -> list[pa.Array]:
        """What `Media` are made of."""
        return [name for part in self._parts for name in part.file.names(part.distinct)]

    def _find(self, index: int) -> tuple[_Part, int]:
        for part in self._parts:
            if 0 <= index < len(part.rows):
                return part, index
            index -= len(part.rows)
        raise IndexError("no such conversation")


class Media:
    """The different media of conversations, in the order of their files, in little memory."""

    def __init__(self, *conversations: Conversations) -> None:
        chunks = [names for some in conversations for names in some.names()]
        self._names = pc.unique(pa.chunked_array(chunks, pa.large_string()))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, places: slice) -> list[Medium]:
        """Some of them."""
        return [_medium(name) for name in self._names[places].to_pylist()]

    def __iter__(self) -> Iterator[Medium]:
        for start in range(0, len(self), _MADE_AT_ONCE):
            yield from self[start : start + _MADE_AT_ONCE]

    def modalities(self) -> list[str]:
        """Those of which there are any, in one order in all processes."""
        return [modality for modality in MODALITIES if pc.any(self._of(modality)).as_py()]

    def names(self, modality: str) -> list[str]:
        """The names of one modality: less than to make each a `Medium`."""
        names = self._names.filter(self._of(modality))
        return pc.utf8_slice_codeunits(names, len(modality) + 1).to_pylist()

    def _of(self, modality: str) -> pa.Array:
        return pc.starts_with(self._names, _name(Medium(modality, "")))


@dataclass(frozen=True)
class _Part:
    """Rows of a file, some of them more than once, each with the encoder that it is seen with."""

    file: RecordFile
    rows: npt.NDArray[np.int64]
    views: npt.NDArray[np.int64]

    @classmethod
    def whole(cls, file: RecordFile) -> _Part:
        return cls(file, file.good, np.zeros_like(file.good))

    @property
    def distinct(self) -> npt.NDArray[np.int64]:
        """The rows without repeats."""
        rows = self.rows
        return rows if (np.diff(rows) > 0).all() else np.unique(rows)

    def taken(self, at: npt.NDArray[Any]) -> _Part:
        return _Part(self.file, self.rows[at], self.views[at])

    def without(self, names: list[str]) -> _Part:
        return self.taken(~self.file.naming(self.rows, names))

    def seen(self, weight: float, seed: tuple[int, int]) -> _Part:
        times, share = divmod(weight, 1)
        drawn = np.random.default_rng(seed).permutation(len(self.rows))
        more = np.sort(drawn[: round(share * len(self.rows))])
        return self.taken(np.concatenate([*[np.arange(len(self.rows))] * int(times), more]))

    def viewed(self, known: Sequence[Collection[str]]) -> _Part:
        beginnings = [[_name(Medium(kind, "")) for kind in kinds] for kinds in known]
        by_row = np.array([self.file.naming_like(self.rows, some) for some in beginnings]).T
        by_row[:, 0] |= ~by_row.any(axis=1)
        at, views = by_row.nonzero()
        return _Part(self.file, self.rows[at], views)


def _name(medium: Medium) -> str:
    return f"{medium.modality}\0{medium.name}"


def _medium(name: str) -> Medium:
    modality, _, ref = name.partition("\0")
    return Medium(modality, ref)


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
    said, media = _checked(record, where)
    turns, _ = turns_of(said, media)
    return Conversation(record.get("id", where), tuple(turns), where)


def said_before(conversations: Any) -> tuple[tuple[str, str], ...]:
    """Roles and texts of the turns before a question, in LLaVA's form.

    Raises:
        RecordError: they have another form, do not alternate, or do not end with an answer.
    """
    said = _said(conversations)
    _check_roles(said)
    return tuple(said)


def checked_row(record: Mapping[str, Any], where: str) -> Row:
    """A record as it is kept.

    Raises:
        RecordError: see `parse_conversation`.
    """
    _, media = _checked(record, where)
    return Row(where, packed(record), [_name(medium) for medium in media])


def _checked(
    record: Mapping[str, Any], where: str
) -> tuple[list[tuple[str, str]], tuple[Medium, ...]]:
    """What is said in a record, as roles and texts, and its media."""
    identity = record.get("id", where)
    if not isinstance(identity, (str, int)):
        raise RecordError(f"id must be text or a number, not {identity!r}", where=where)
    try:
        media = media_of_record(record)
        if "conversations" in record:
            said = _said(record["conversations"])
        elif "instruction" in record:
            said = _alpaca(record)
        else:
            raise RecordError("a record has neither conversations nor instruction")
        _check_roles(said)
        _check_counts(said, media)
    except RecordError as error:
        place = where if identity == where else f"{where} (id {identity})"
        raise RecordError(error.what, where=place, hint=error.hint) from None
    return said, media


def _said(conversations: Any) -> list[tuple[str, str]]:
    if not isinstance(conversations, list) or not conversations:
        raise RecordError("conversations must be a list with at least one turn")
    said = []
    for number, turn in enumerate(conversations, start=1):
        text = turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(text, str):
            raise RecordError(f"turn {number} has no text under value")
        role = _ROLES.get(str(turn.get("from")))
        if role is None:
            raise RecordError(
                f"turn {number} is from {turn.get('from')!r}",
                hint="the roles are human and gpt",
            )
        said.append((role, text))
    return said


def _alpaca(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    fields = {key: record.get(key, "") for key in ("instruction", "input", "output")}
    for key, value in fields.items():
        if not isinstance(value, str):
            raise RecordError(f"{key} must be text")
    if "output" not in record:
        raise RecordError("a record with an instruction has no output")
    asked = "\n".join(text for text in (fields["instruction"], fields["input"]) if text)
    return [(HUMAN, asked), (GPT, fields["output"])]


def _check_roles(said: Sequence[tuple[str, str]]) -> None:
    before = ""
    for number, (role, _) in enumerate(said, start=1):
        if before == role:
            raise RecordError(
                f"turns {number - 1} and {number} are both from {role}",
                hint="human and gpt must take turns",
            )
        before = role
    if before != GPT:
        raise RecordError("the last turn is not an answer (from gpt)")


def _check_counts(said: Iterable[tuple[str, str]], media: Sequence[Medium]) -> None:
    asked = [kind for role, text in said if role == HUMAN for kind in placeholders(text)]
    named = [medium.modality for medium in media]
    if asked == named:
        return
    for modality in MODALITIES:
        wanted, given = asked.count(modality), named.count(modality)
        if wanted != given:
            raise RecordError(
                f"{wanted} <{modality}> placeholder(s) in the questions, "
                f"but {given} under the key {modality}",
                hint="they must agree",
            )

"""Question records: what they may hold, and the question that is made of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from difflib import get_close_matches
from functools import partial
from itertools import islice
from typing import Any

from chatbind_cli.console import note
from chatbind_cli.errors import ChatBindError, RecordError, UsageError, contained
from chatbind_cli.evaluation.accuracy import options_of
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.questions import Question
from chatbind_cli.jsonl import Line, Record, record_id
from chatbind_cli.media.medium import Medium, media_of_record
from chatbind_cli.media.modality import MODALITIES

_READ = ("question_id", "id", "text", "conversations", "system", "weights", "mix", "generation")
_READ_ELSEWHERE = ("choices", "options", "category", "answer", "answers", "reference", "label")
_MEANT = {
    **dict.fromkeys((field.name for field in fields(GenerationSettings)), "generation"),
    **dict.fromkeys(("question", "query", "prompt", "instruction"), "text"),
    **dict.fromkeys(("img", "picture", "photo"), "image"),
    **dict.fromkeys(("sound", "clip"), "audio"),
    **dict.fromkeys(("history", "messages"), "conversations"),
}
_CLOSE = 0.8
_MOST_NAMES = 1000  # keys that are looked at in a run
_MOST_NOTES = 20
_LONGEST_NAME = 40
_MOST_LISTED = 10_000  # choices, or media: no context has room for more
_SHOWN = 80


def read_question(
    line: Line,
    settings: GenerationSettings = GenerationSettings(),  # noqa: B008 (frozen)
    *,
    choices: bool = False,
) -> Question:
    """The question in a line; one that cannot be answered has a `problem`.

    Args:
        line: its record is `{"question_id", "text", "image" | "audio" | ..., ...}`; see the page
            on formats.
        settings: the run's, which the record's `generation` changes.
        choices: whether the answer is one of the record's `choices`, or of the letters in its text.
    """
    return question_in(line, record_id, partial(_asked, settings=settings, choices=choices))


def question_in(
    line: Line,
    identify: Callable[[Record], str | int],
    ask: Callable[[Record], Question],
) -> Question:
    """The question that `ask` makes of the record in a line, or one with its `problem`."""
    record, where, number, problem = line
    identity: str | int | None = None
    try:
        identity = identify(record)
    except RecordError as error:
        # without an id its answer could not be told from others
        problem = problem or RecordError(error.what, where=where)
    question = Question(id=identity, record=record, where=where, problem=problem)
    if problem is not None:
        return replace(question, line=number)
    try:
        return replace(ask(record), id=identity, record=record, where=where)
    except ChatBindError as error:
        problem = RecordError(error.what, where=error.where or where, hint=error.hint)
        return replace(question, problem=problem)
    except Exception as error:
        return replace(question, problem=contained(error, where=where))


def odd_keys_noted(lines: Iterator[Line]) -> Iterator[Line]:
    """The lines; a key that is not read, but looks like one that is, is noted once."""
    seen: set[str] = set()
    noted = 0
    for line in lines:
        room = _MOST_NAMES - len(seen)
        for key in islice(line.record.keys() - seen, room) if room and noted < _MOST_NOTES else ():
            seen.add(key)
            meant = _meant(key)
            if meant is not None and meant not in line.record:
                noted += 1
                note(f"{line.where}: the key {key} means nothing here; is {meant} meant?")
        yield line


def _meant(key: str) -> str | None:
    """The key that was meant by one that is not read; None if it looks like none."""
    known = (*_READ, *_READ_ELSEWHERE, *MODALITIES)
    if key in known or len(key) > _LONGEST_NAME:
        return None
    name = key.lower()
    near = [name] if name in known or name in _MEANT else []
    near = near or get_close_matches(name, [*known, *_MEANT], n=1, cutoff=_CLOSE)
    return _MEANT.get(near[0], near[0]) if near else None


def _asked(record: Record, settings: GenerationSettings, choices: bool) -> Question:
    """The question that a record asks.

    Raises:
        ChatBindError: what is wrong with it.
    """
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
        raise RecordError("a question has no text")
    system, mix = record.get("system"), record.get("mix")
    if not isinstance(system, str | None):
        raise RecordError("system must be text")
    if not isinstance(mix, bool | None):
        raise RecordError("mix must be true or false")
    media = media_of_record(record)
    if len(media) > _MOST_LISTED:
        raise RecordError(f"{len(media):,} media; {_MOST_LISTED:,} are the most")
    return Question(
        text=text,
        media=weighted(media, record.get("weights")),
        mix=bool(mix),
        system=system,
        earlier=_earlier(record.get("conversations")),
        choices=_choices(record, text) if choices else (),
        # nothing is generated where there is a choice
        settings=None if choices else _settings(record.get("generation"), settings),
    )


def weighted(media: tuple[Medium, ...], weights: Any) -> tuple[Medium, ...]:
    """The media with the weights of a record: one for all, or a list with one for each.

    Raises:
        RecordError: there are more or fewer than media, or one is no number.
    """
    if weights is None:
        return media
    each = weights if isinstance(weights, list) else [weights] * len(media)
    if len(each) != len(media):
        raise RecordError(f"{len(each)} weights for {len(media)} media")
    if not all(type(weight) in (int, float) and _is_float32(weight) for weight in each):
        raise RecordError("weights must be a finite number or a list of them")
    return tuple(
        replace(medium, weight=float(weight)) for medium, weight in zip(media, each, strict=True)
    )


def _is_float32(number: float) -> bool:
    """Whether it is finite in the numbers of the model; JSON's whole numbers know no end."""
    return abs(number) < 1e38 and math.isfinite(number)


def _earlier(conversations: Any) -> tuple[tuple[str, str], ...]:
    """Roles and texts of the turns before a question."""
    if conversations is None or conversations == []:
        return ()
    # it brings numpy and pyarrow, and few questions have any
    from chatbind_cli.data.conversations import said_before  # noqa: PLC0415

    return said_before(conversations)


def _choices(record: Record, text: str) -> tuple[str, ...]:
    """The answers to choose from: under `choices` or `options`, else the letters in the text."""
    given = record.get("choices", record.get("options"))
    if given is None:
        given = list(options_of({"text": text}))
        if not given:
            raise RecordError(
                "a question leaves no choices",
                hint="list them under choices, or as A., B., ... on lines of its text",
            )
    if not isinstance(given, list) or not given:
        raise RecordError("choices must be a list of texts")
    if len(given) > _MOST_LISTED:
        raise RecordError(f"{len(given):,} choices; {_MOST_LISTED:,} are the most")
    for number, choice in enumerate(given, start=1):
        if isinstance(choice, bool) or not isinstance(choice, str | int | float):
            raise RecordError(f"choice {number} is no text: {repr(choice)[:_SHOWN]}")
        if not str(choice).strip():
            raise RecordError(f"choice {number} is empty")
    return tuple(str(choice).strip() for choice in given)


def _settings(own: Any, settings: GenerationSettings) -> GenerationSettings | None:
    """The run's settings with the record's own; None: it has none that differ."""
    if own is None:
        return None
    if not isinstance(own, dict):
        raise RecordError('generation must be an object, as {"temperature": 0.5}')
    try:
        changed = settings.changed(own)
    except UsageError as error:
        raise RecordError(f"generation: {error.what}", hint=error.hint) from error
    return None if changed == settings else changed

"""A dialogue as a record: a conversation as training reads it, and what else its prompt needs."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from chatbind_cli.data.conversations import parse_conversation
from chatbind_cli.errors import ChatBindError, RecordError, UsageError
from chatbind_cli.files import refuse_foreign_records, replace_file
from chatbind_cli.inference.answer_record import short_digest
from chatbind_cli.inference.chat import Chat, Exchange
from chatbind_cli.inference.question_record import weighted
from chatbind_cli.inference.questions import Question
from chatbind_cli.jsonl import Record, dumps, read_records
from chatbind_cli.media.medium import Medium, media_of_record
from chatbind_cli.model.turns import HUMAN, Turn, with_media

_MADE_BY = "chatbind ask"


def write_dialogue(chat: Chat, path: Path) -> None:
    """Writes a dialogue to a file, whole or not at all.

    Raises:
        ChatBindError: nothing was said, a record cannot say it, or the file is another's.
    """
    record = _record(chat)
    refuse_foreign_records(path, ("id",), ("conversations", "made_by"))
    try:
        with replace_file(path) as temporary:
            temporary.write_text(f"{dumps(record)}\n", encoding="utf-8")
    except OSError as error:
        raise ChatBindError(f"cannot be written ({error.strerror})", where=str(path)) from error


def read_dialogue(chat: Chat, path: Path) -> None:
    """Takes up the dialogue in a file, in place of what was said; its media are embedded again.

    Raises:
        ChatBindError: it cannot be read, or one of its media; then the chat is as it was.
    """
    records = list(islice(read_records(path), 2))
    if len(records) != 1:
        what = "several records; a dialogue is one" if records else "no record"
        raise RecordError(f"has {what}", where=str(path))
    record, where = records[0]
    conversation = parse_conversation(record, where)
    system, mix = record.get("system"), record.get("mix", False)
    left_out = record.get("left_out", 0)
    if not isinstance(system, str | None) or not isinstance(mix, bool):
        raise RecordError("system must be text, and mix true or false", where=where)
    try:
        turns = _weighted(conversation.turns, record)
    except RecordError as error:
        raise RecordError(error.what, where=where) from error
    asked, answers = turns[::2], turns[1::2]
    if asked[0].role != HUMAN:
        raise RecordError("the dialogue begins with an answer", where=where)
    if type(left_out) is not int or not 0 <= left_out <= len(asked):
        raise RecordError(f"left_out is not a number of its {len(asked)} questions", where=where)
    before, chat.system = chat.system, system
    try:
        prepared = chat.prepare([Question(turn.text, turn.media, mix) for turn in asked])
    except BaseException:
        chat.system = before
        raise
    pairs = zip(prepared, answers, strict=True)
    chat.exchanges = [Exchange(question, answer.text) for question, answer in pairs]
    chat.mix, chat.left_out = mix, left_out


def _record(chat: Chat) -> Record:
    if not chat.exchanges:
        raise UsageError("nothing was said yet")
    conversations: list[Record] = []
    media: dict[str, list[Medium]] = {}
    for said in chat.exchanges:
        asked, turn = said.question, said.question.turn
        assert turn is not None
        conversations.append({"from": "human", "value": turn.text})
        conversations.append({"from": "gpt", "value": said.answer})
        if asked.mix and len(asked.media) > 1:
            raise ChatBindError("a record cannot say what was mixed of several media")
        for medium in turn.media:
            assert medium.modality is not None
            given = replace(medium, weight=asked.media[0].weight) if asked.mix else medium
            media.setdefault(medium.modality, []).append(given)
    weights = [medium.weight for named in media.values() for medium in named]
    more = {
        "system": chat.system,
        **{key: [m.name for m in named] for key, named in media.items()},
        "weights": weights if any(weight != 1.0 for weight in weights) else None,
        "mix": chat.mix or None,
        "left_out": chat.left_out or None,
    }
    record: Record = {
        "id": short_digest(chat.model_id, more, conversations),
        **{key: value for key, value in more.items() if value is not None},
        "conversations": conversations,
        "model_id": chat.model_id,
        "made_by": _MADE_BY,
    }
    _check(record, [said.question for said in chat.exchanges])
    return record


def _check(record: Record, asked: Sequence[Question]) -> None:
    """Makes sure that the record says what was asked.

    Raises:
        ChatBindError: it would be read as something else.
    """
    try:
        turns = parse_conversation(json.loads(dumps(record)), "the dialogue").turns[::2]
    except RecordError:
        turns = ()
    said = [question.turn for question in asked if question.turn is not None]
    if list(map(_marked, turns)) != list(map(_marked, said)):
        raise ChatBindError(
            "a record cannot tell which of the placeholders in the dialogue's words are media"
        )


def _marked(turn: Turn) -> str:
    parts = (p if isinstance(p, str) else f"\0{p.modality}\0{p.name}\0" for p in turn.content)
    return "".join(parts)


def _weighted(turns: Sequence[Turn], record: Record) -> list[Turn]:
    """The turns with the weights that a record gives its media, in the order of its keys."""
    left: dict[str | None, deque[float]] = defaultdict(deque)
    for medium in weighted(media_of_record(record), record.get("weights")):
        left[medium.modality].append(medium.weight)
    media = (medium for turn in turns for medium in turn.media)
    return with_media(turns, (replace(m, weight=left[m.modality].popleft()) for m in media))

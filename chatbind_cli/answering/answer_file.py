"""The file of answers: continued by id, and in the order of the questions at the end.

While a run works, records are appended; a question that failed in an earlier run and succeeds in
this one lands behind those that were done already. When the last question is through, the file is
put in order once, and replaced whole. Knows nothing of how answers are made.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from chatbind_cli.console import printable
from chatbind_cli.errors import RecordError
from chatbind_cli.files import replace_file
from chatbind_cli.jsonl import Record, RecordWriter, read_records

KEY = "question_id"

_OF_ONE_ANSWER = {"n_tokens", "finish_reason"}


class AnswerFile:
    """Where answers go.

    Args:
        target: a path, or `-` for standard output.
        overwrite: start anew instead of continuing what is there.
        model_id: whose answers these are; a file with another model's is not continued.
        making: the `metadata` that every answer of this run shares; a file whose first answer was
            made otherwise is not continued, since its answers would not be comparable.

    Raises:
        RecordError: the file there cannot be continued.
    """

    def __init__(
        self,
        target: str | Path,
        *,
        overwrite: bool = False,
        model_id: str,
        making: Mapping[str, Any],
    ) -> None:
        self._path = None if str(target) == "-" else Path(target)
        if self._path is not None and not overwrite:
            _check_making(self._path, making)
        self._writer = RecordWriter(
            target,
            key=KEY,
            overwrite=overwrite,
            expect={"model_id": model_id},
            in_words=in_words,
        )
        self._continued = bool(self._writer.done)
        self._order: dict[Hashable, tuple[int, str]] = {}

    def expect(self, identity: Hashable, where: str) -> str:
        """Notes that a question is next in line.

        Args:
            identity: its id, or `("line", number)` of a line that is no question.
            where: where it stands.

        Returns:
            Where the first question of that id stands: `where`, unless there was one before.
        """
        return self._order.setdefault(identity, (len(self._order), where))[1]

    def wants(self, identity: Hashable) -> bool:
        """Whether the answer to a question is still missing."""
        return identity not in self._writer.done

    def write(self, record: Record) -> None:
        """Writes one answer and hands it to the operating system."""
        self._writer.write(record)

    def finish(self) -> None:
        """Puts the file in the order of the questions; answers to others stay behind them.

        Call it when every question is through.
        """
        self._writer.close()
        if self._path is None or not self._continued:
            return
        places = list(_places(self._path))
        last = (len(self._order), "")
        ordered = sorted(places, key=lambda place: self._order.get(place[0], last)[0])
        if ordered == places:
            return
        with (
            replace_file(self._path) as temporary,
            self._path.open("rb") as old,
            temporary.open("wb") as new,
        ):
            for _, start, end in ordered:
                old.seek(start)
                new.write(old.read(end - start))

    def __enter__(self) -> AnswerFile:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the file."""
        self._writer.close()


def in_words(record: Record) -> str:
    """An answer as a person reads it: what was asked, and below it what was said."""
    said = record.get("text", f"error: {record.get('error')}")
    asked = "  ".join(" ".join(str(record.get(key, "")).split()) for key in (KEY, "prompt"))
    return printable(f"{asked.rstrip()}\n    {said}")


def _check_making(path: Path, making: Mapping[str, Any]) -> None:
    """Compares how the file's first answer was made with how this run makes them.

    Raises:
        RecordError: they differ.
    """
    first = _first_answer(path)
    if first is None:
        return
    there = first.get("metadata")
    if not isinstance(there, dict) or not there.keys() & making.keys():
        # somebody else's file, which does not say
        return
    both = there.keys() & making.keys()
    keys = (there.keys() | making.keys()) - _OF_ONE_ANSWER
    for key in sorted(keys, key=lambda key: (key not in both, key)):
        if there.get(key) != making.get(key):
            raise RecordError(
                f"its answers were made with {key} {there.get(key)!r}, "
                f"this run has {making.get(key)!r}",
                where=str(path),
                hint="give another output file, or --overwrite",
            )


def _first_answer(path: Path) -> Record | None:
    """The first whole record without an error; a broken one is the writer's business."""
    if not path.is_file():
        return None
    try:
        for record, _ in read_records(path):
            if "error" not in record:
                return record
    except RecordError:
        return None
    return None


def _places(path: Path) -> Iterator[tuple[Hashable, int, int]]:
    """The id, start and end of every line; the id of what was no question is its line's number."""
    with path.open("rb") as file:
        lines = [len(line) for line in file]
    start = 0
    for (record, _), length in zip(read_records(path), lines, strict=True):
        identity = ("line", record["line"]) if "line" in record else record[KEY]
        yield identity, start, start + length
        start += length

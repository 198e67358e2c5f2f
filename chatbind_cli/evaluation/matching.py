"""Files of records that are matched by id, and what of them does not fit together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Literal

from chatbind_cli.errors import RecordError
from chatbind_cli.jsonl import Line, Record, legible, read_lines, record_id

Kind = Literal["doubled", "unasked", "missing", "failed", "wordless", "no context", "unusable"]

_SHOWN = 8
_TEXTS: dict[Kind, tuple[str, str]] = {
    "doubled": (
        "question {ids} is there more than once; the first one counts",
        "{n} questions are there more than once ({ids}); the first one of each counts",
    ),
    "unasked": (
        "answers question {ids}, which was not asked",
        "{n} answers to questions that were not asked ({ids})",
    ),
    "missing": ("no answer to question {ids}", "no answer to {n} questions ({ids})"),
    "failed": ("the answer to question {ids} failed", "{n} answers failed ({ids})"),
    "wordless": ("the answer to question {ids} has no text", "{n} answers have no text ({ids})"),
    "no context": ("no context for question {ids}", "no context for {n} questions ({ids})"),
    "unusable": ("line {ids}", "{n} lines cannot be used (line {ids})"),
}


class Mismatches:
    """Gathers what does not fit, by file and kind.

    A thousand answers that are missing make one line that names the first of them.
    """

    def __init__(self) -> None:
        self._ids: dict[tuple[str, Kind], dict[str, None]] = {}

    def add(self, name: str, kind: Kind, what: str) -> None:
        """Notes one question, or line, of one file; the same one again changes nothing."""
        self._ids.setdefault((name, kind), {})[what] = None

    def lines(self) -> list[str]:
        """A line for each file and kind, with how many there are and the first of them."""
        found = []
        for (name, kind), ids in self._ids.items():
            shown = ", ".join(list(ids)[:_SHOWN]) + (", ..." if len(ids) > _SHOWN else "")
            one, several = _TEXTS[kind]
            text = one if len(ids) == 1 else several
            found.append(f"{name}: {text.format(n=f'{len(ids):,}', ids=shown)}")
        return found


def records_by_id(
    path: Path | str, mismatches: Mismatches, unusable: dict[int, str] | None = None
) -> dict[str, Record]:
    """The records by id. Of two with the same id the first counts, and the second is reported.

    Args:
        path: the file.
        mismatches: where that is reported, and what is no record with an id.
        unusable: filled with the latter, by line.
    """
    found: dict[str, Record] = {}
    name = legible(str(path))
    for key, record in keyed(read_lines(path), name, mismatches, unusable):
        if key in found:
            mismatches.add(name, "doubled", key)
        else:
            found[key] = record
    return found


def keyed(
    lines: Iterable[Line], name: str, mismatches: Mismatches, unusable: dict[int, str] | None = None
) -> Iterator[tuple[str, Record]]:
    """Records with their ids as text; see `records_by_id`."""
    for line in lines:
        if "error" in line.record and "line" in line.record and "question_id" not in line.record:
            continue  # of `vqa`: a line of its questions that was none
        try:
            if line.problem is not None:
                raise line.problem
            key = str(record_id(line.record))
        except RecordError as error:
            mismatches.add(name, "unusable", f"{line.number}: {error.what}")
            if unusable is not None:
                unusable[line.number] = f"{line.where}: {error.what}"
        else:
            yield key, line.record


def distinct_names(files: Sequence[str]) -> list[str]:
    """What to call files: by their names, and as many folders above as tell them apart."""
    paths = [PurePath(file).parts for file in files]
    tails = []
    for path in paths:
        others = [other for other in paths if other != path]
        alone = (n for n in range(1, len(path)) if all(o[-n:] != path[-n:] for o in others))
        tails.append(str(PurePath(*path[-next(alone, len(path)) :])))
    short = [tail.partition(".json")[0] or tail for tail in tails]
    return short if len(set(short)) == len(set(tails)) else tails

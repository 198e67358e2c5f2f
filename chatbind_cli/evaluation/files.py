"""Files of records: which ones are meant, what they are called, and what in them does not fit.

Records of several files are matched by id.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath

from chatbind_cli.errors import RecordError, UsageError
from chatbind_cli.evaluation.published import as_reviews
from chatbind_cli.jsonl import Line, Record, legible, read_lines, record_id

UNREADABLE = "unreadable"
"""The key of a failed review that stands for a line which is none."""

DOUBLED = "more than once, the first one counts: question"
UNUSABLE = "cannot be used: line"
_SHOWN = 8

# Names of review files in a folder, as the seed's scripts write them and as Vicuna published them.
_PREFIXES = ("gpt4_text_", "reviews_", "review_")
_PATTERNS = ("gpt4_text*.jsonl", "review*.jsonl", "review*.json")
_FOLDERS = (".", "review", "reviews")


class Mismatches:
    """Gathers what does not fit, by file and kind.

    A thousand answers that are missing make one line that names the first of them.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], dict[str, None]] = {}

    def add(self, name: str, what: str, which: str) -> None:
        """Notes one question, or line, of one file; the same one again changes nothing.

        Args:
            name: the file.
            what: what is the matter, in words that `which` is put behind.
            which: one question's id, or a line.
        """
        self._found.setdefault((name, what), {})[which] = None

    def lines(self) -> list[str]:
        """A line for each file and kind, with the first of them and how many there are."""
        found = []
        for (name, what), which in self._found.items():
            shown = ", ".join(list(which)[:_SHOWN])
            if len(which) > _SHOWN:
                shown += f", ... ({len(which):,} in all)"
            found.append(f"{name}: {what} {shown}")
        return found


def records_by_id(
    path: Path | str, mismatches: Mismatches, unusable: dict[int, str] | None = None
) -> dict[str, Record]:
    """The records by id. Of two with the same id the first counts, and the second is a mismatch.

    So is a line that is no record with an id; `unusable` is filled with such, by line.
    """
    found: dict[str, Record] = {}
    name = legible(str(path))
    for key, record in keyed(read_lines(path), name, mismatches, unusable):
        if key in found:
            mismatches.add(name, DOUBLED, key)
        else:
            found[key] = record
    return found


def keyed(
    lines: Iterable[Line], name: str, mismatches: Mismatches, unusable: dict[int, str] | None = None
) -> Iterator[tuple[str, Record]]:
    """Records with their ids as text; see `records_by_id`."""
    for line in lines:
        nameless = line.record.get("question_id") is None
        if nameless and "error" in line.record and "line" in line.record:
            continue  # of `vqa`: a line of its questions that was none
        try:
            if line.problem is not None:
                raise line.problem
            key = str(record_id(line.record))
        except RecordError as error:
            mismatches.add(name, UNUSABLE, f"{line.number}: {error.what}")
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


def find_reviews(names: Sequence[str], folder: Path | None) -> list[str]:
    """The review files that are meant, by the words of the call or by where they usually are.

    Raises:
        UsageError: there are none.
    """
    found = list(names)
    if folder is not None:
        found += _in_folder(folder)
        if not found:
            raise UsageError(f"no file named {' or '.join(_PATTERNS)}", where=str(folder))
    if not found and not sys.stdin.isatty():
        return ["-"]
    if not found:
        found = [path for name in _FOLDERS for path in _in_folder(Path(name))]
    if not found:
        raise UsageError(
            "no reviews: nothing on standard input, and no review files here",
            hint="name a file, a folder with --dir, or pipe `chatbind review` into it",
        )
    return found


def _in_folder(folder: Path) -> list[str]:
    paths = {path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return [str(path) for path in sorted(paths)]


def run_names(files: Sequence[str]) -> dict[str, str]:
    """What files' reviews are of: `gpt4_text_chatbind.jsonl` is about `chatbind`."""
    files = list(dict.fromkeys(files))
    short = [_run_name(file) for file in files]
    return {
        file: legible(name if short.count(name) == 1 else tail)
        for file, name, tail in zip(files, short, distinct_names(files), strict=True)
    }


def _run_name(file: str) -> str:
    if file == "-":
        return "stdin"
    name = Path(file).name.partition(".json")[0]
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name or file


def read_reviews(file: str) -> Iterator[Record]:
    """The reviews of a file; of a line that is none, a failed one with as much as can be told."""
    for line in read_lines(file):
        if line.problem is None:
            yield from as_reviews(line.record)
        else:
            known = {"category": line.record.get("category"), "error": str(line.problem)}
            yield {**known, UNREADABLE: line.number}

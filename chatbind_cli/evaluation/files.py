"""Files of reviews: which ones are meant, what they are called, and what stands in them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from chatbind_cli.errors import UsageError
from chatbind_cli.evaluation.matching import distinct_names
from chatbind_cli.jsonl import Record, legible, read_lines

UNREADABLE = "unreadable"
"""The key of a failed review that stands for a line which is none."""

# Names of review files in a folder, as the seed's scripts write them and as Vicuna published them.
_PREFIXES = ("gpt4_text_", "reviews_", "review_")
_PATTERNS = ("gpt4_text*.jsonl", "review*.jsonl", "review*.json")
_FOLDERS = (".", "review", "reviews")


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
            yield line.record
        else:
            known = {"category": line.record.get("category"), "error": str(line.problem)}
            yield {**known, UNREADABLE: line.number}

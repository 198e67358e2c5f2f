"""What of a review's files does not fit together, listed by file and kind.

A thousand answers that are missing make one line that names the first of them. Knows nothing of
what the files hold.
"""

from __future__ import annotations

from typing import Literal

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
    """Gathers what does not fit."""

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

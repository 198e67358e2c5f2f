"""The files that a training run takes its conversations from, and how much of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from chatbind_cli.errors import UsageError
from chatbind_cli.media.medium import is_there

_MOST = 100.0  # times: more is an epoch's business


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of conversations.

    Args:
        path: the file.
        weight: how often an epoch sees each of its conversations; below 1 it sees a part of them.
    """

    path: Path
    weight: float = 1.0

    def __str__(self) -> str:
        return str(self.path) if self.weight == 1 else f"{self.path}:{self.weight:g}"

    @classmethod
    def parse(cls, text: str) -> DataFile:
        """Reads the `FILE` or `FILE:WEIGHT` of an option.

        A file whose name really ends in `:2` is meant as that file.

        Raises:
            UsageError: the weight is not above 0, or above 100.
        """
        name, _, number = text.rpartition(":")
        if not name or is_there(text):
            return cls(Path(text))
        try:
            weight = float(number)
        except ValueError:
            return cls(Path(text))
        if not 0 < weight <= _MOST:
            raise UsageError(
                f"--data {text}: the weight must be above 0, and at most {_MOST:g}",
                hint="a whole number: so many times an epoch; a part of 1: of the conversations",
            )
        return cls(Path(name), weight)

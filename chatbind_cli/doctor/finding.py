"""One thing that was looked at, and what was found."""

from __future__ import annotations

from dataclasses import dataclass

from chatbind_cli.jsonl import Record

OK, NOTE, PROBLEM = "ok", "note", "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found.

    Attributes:
        area: what it belongs to: `python`, `package`, `device`, `room`, `media`, `model`, `hub`,
            `file`.
        name: what was looked at.
        status: `ok`; `note`: something is less than it could be; `problem`: the main job cannot
            run.
        value: what is there.
        hint: what to do about it, where there is something.
    """

    area: str
    name: str
    status: str
    value: str
    hint: str | None = None

    def record(self) -> Record:
        """The finding as a record."""
        record: Record = {
            "area": self.area,
            "name": self.name,
            "status": self.status,
            "value": self.value,
        }
        if self.hint is not None:
            record["hint"] = self.hint
        return record

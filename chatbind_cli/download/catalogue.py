"""The catalogue of artefacts: what there is, where it comes from, what it is for.

The entries are data (`catalogue.toml`, whose head explains the keys); this module gives them types
and looks them up.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from chatbind_cli.errors import UsageError

STAGES = ("pretrain", "finetune", "ask", "review")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One artefact; `catalogue.toml` says what the fields mean, and what is known of its files."""

    name: str
    title: str
    purpose: str
    licence: str
    stages: tuple[str, ...]
    commands: tuple[str, ...]
    folder: str
    gated: bool = False
    hub: str | None = None
    about: str | None = None
    include: tuple[str, ...] = ()
    files: tuple[Mapping[str, Any], ...] = ()

    @property
    def source(self) -> str:
        """Where it comes from, in one word."""
        first = self.files[0] if self.files else {}
        hub = self.hub or first.get("hub")
        return f"hf:{hub}" if hub is not None else str(first.get("url", ""))

    @property
    def bytes(self) -> int | None:
        """Exact size of all its files, where every one is known."""
        sizes = [file["bytes"] for file in self.files if "bytes" in file]
        return sum(sizes) if sizes and len(sizes) == len(self.files) else None


@cache
def entries() -> Mapping[str, Entry]:
    """The catalogue, by name, in its own order."""
    text = resources.files(__package__).joinpath("catalogue.toml").read_text(encoding="utf-8")
    return {name: _entry(name, table) for name, table in tomllib.loads(text).items()}


def look_up(name: str) -> Entry:
    """The entry of a name.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    found = entries().get(name)
    if found is None:
        near = difflib.get_close_matches(name, entries(), n=1)
        hint = f"did you mean {near[0]}?" if near else "`chatbind download --list` shows the names"
        raise UsageError(f"nothing in the catalogue is named {name!r}", hint=hint)
    return found


def for_stage(stage: str) -> Iterable[Entry]:
    """What a stage needs."""
    return [entry for entry in entries().values() if stage in entry.stages]


def _entry(name: str, table: Mapping[str, Any]) -> Entry:
    fields: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in table.items()
    }
    files = fields.pop("files", ())
    sources = [f.get("path") or f.get("url") or f["hub"] for f in files]
    named = [
        {"to": source.rpartition("/")[2], **file}
        for source, file in zip(sources, files, strict=True)
    ]
    return Entry(name=name, files=tuple(named), **fields)

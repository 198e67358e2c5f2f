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
from typing import Any, Literal

from chatbind_cli.errors import UsageError

# By what a file is known; `git-sha1` is its name in Git, as the hub lists files that are not in
# large-file storage.
Checksum = tuple[Literal["sha256", "git-sha1", "md5"], str]

STAGES = ("pretrain", "finetune", "ask", "review")


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueFile:
    """One file of an entry.

    Attributes:
        path: its path in the entry's hub repository, or None for a plain URL.
        url: its URL, or None for a file of the hub.
        to: its name below the entry's folder.
        bytes: exact size, where it is known.
        sha256: hex digest, where it is known.
        md5: hex digest, where nothing better is published.
        unpack: for an archive whose content is what is wanted: the folder that it goes to, below
            the entry's; None for a file that is wanted as it is.
    """

    path: str | None = None
    url: str | None = None
    to: str
    bytes: int | None = None
    sha256: str | None = None
    md5: str | None = None
    unpack: str | None = None

    @property
    def checksum(self) -> Checksum | None:
        """The digest to go by."""
        if self.sha256 is not None:
            return "sha256", self.sha256
        return ("md5", self.md5) if self.md5 is not None else None

    def known(self) -> dict[str, Any]:
        """Source, size and digest, as far as they are published."""
        facts = {
            "source": self.path or self.url,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "md5": self.md5,
        }
        return {key: value for key, value in facts.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One artefact; `catalogue.toml` says what the fields mean."""

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
    files: tuple[CatalogueFile, ...] = ()

    @property
    def source(self) -> str:
        """Where it comes from, in one word."""
        if self.hub is not None:
            return f"hf:{self.hub}"
        return " ".join(file.url or "" for file in self.files[:1])

    @property
    def bytes(self) -> int | None:
        """Exact size of all its files, where every one is known."""
        sizes = [file.bytes for file in self.files if file.bytes is not None]
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
    fields["files"] = tuple(_file(file) for file in table.get("files", ()))
    return Entry(name=name, **fields)


def _file(table: Mapping[str, Any]) -> CatalogueFile:
    source = str(table.get("path") or table["url"])
    return CatalogueFile(**{"to": source.rpartition("/")[2], **table})

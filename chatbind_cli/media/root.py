"""The media root: the folder that the media paths of records start from, and may not leave."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote

from chatbind_cli.errors import MediaError
from chatbind_cli.media.fetch import Limits
from chatbind_cli.media.public import is_public
from chatbind_cli.media.source import MediaSource, open_source, shown

ADDRESSES = ("http://", "https://", "data:")
"""How the names begin that are no paths."""

_WORTH_LISTING = 64
"""Names in a folder: a folder of millions is not listed for the sake of a few."""


@dataclass(frozen=True)
class MediaRoot:
    """Where the media of records lie.

    Args:
        folder: what their paths start from; None: the current folder.
        prefix: put before the file name (COCO: `COCO_val2014_`). Without one, a folder whose
            name ends in `val2014` or `2014_val` (or `train`) adds COCO's prefix where only the
            prefixed file exists.
        allow_outside: let `..`, absolute paths and links lead out of the folder.
        files: whether any file is read.
        remote: whether http(s) addresses are read.
        limits: what is taken from them, and from data URIs.
    """

    folder: Path | None = None
    prefix: str = ""
    allow_outside: bool = False
    files: bool = True
    remote: bool = True
    limits: Limits = field(default_factory=Limits)

    @classmethod
    def guarded(
        cls, folder: Path | None, *, remote: bool, most_bytes: int, seconds: float
    ) -> MediaRoot:
        """What a server reads for strangers, who hear nothing of where its files lie.

        Args:
            folder: the only one that files are read from; None: none are.
            remote: whether public http(s) addresses are read.
            most_bytes: of an address or a data URI.
            seconds: for an address.
        """
        limits = Limits(most_bytes, seconds, is_public)
        return cls(folder, files=folder is not None, remote=remote, limits=limits)

    def find(self, name: str) -> Path:
        """The file that a record means by `name`.

        Raises:
            MediaError: the path leaves the root, or no file is there.
        """
        base = self._base()
        where = shown(name)
        if not name or "\0" in name:
            raise MediaError("is not a file name", where=repr(where))
        relative = Path(name)
        hint = "allow it with --allow-outside"
        if not self.allow_outside and (relative.is_absolute() or ".." in relative.parts):
            raise MediaError("leaves the media root", where=where, hint=hint)
        try:
            path = _with_prefix(base / relative, base, self.prefix)
            if not self.allow_outside and not path.resolve().is_relative_to(base.resolve()):
                raise MediaError("is a link that leaves the media root", where=where, hint=hint)
            found = path.is_file()
        except (OSError, ValueError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise MediaError(f"cannot be looked up ({reason})", where=where) from error
        if not found:
            raise MediaError("no such file", where=shown(str(path)), hint="is --media-root right?")
        return path

    def missing(self, names: Iterable[str]) -> dict[str, str]:
        """Those of many names for which `find` would fail, each with its message.

        A folder of many is listed once: asking the disk for half a million files one by one takes
        longer than a step of training.
        """
        folders: dict[str, list[str]] = {}
        for name in names:
            file = name.rpartition("/")[2]
            folders.setdefault(name.removesuffix(file), []).append(file)
        missing = {}
        for folder, inside in folders.items():
            plain = self._plain_files(folder) if len(inside) >= _WORTH_LISTING else frozenset()
            for file in inside:
                if (file if file.startswith(self.prefix) else self.prefix + file) in plain:
                    continue
                try:
                    self.find(folder + file)
                except MediaError as error:
                    missing[folder + file] = str(error)
        return missing

    def _plain_files(self, folder: str) -> Collection[str]:
        """The files in a folder, below the root, that are certainly not outside: links may be."""
        base = self._base()
        try:
            place = (base / folder).resolve()
            if not self.allow_outside and (
                Path(folder).is_absolute()
                or ".." in Path(folder).parts
                or not place.is_relative_to(base.resolve())
            ):
                return frozenset()
            with os.scandir(place) as entries:
                return {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
        except (OSError, ValueError, RuntimeError):
            return frozenset()  # `find` says why

    def _base(self) -> Path:
        return (self.folder if self.folder is not None else Path()).absolute()

    def open(self, ref: str | Path | bytes) -> MediaSource:
        """The bytes that a record means by a name; http(s), data and file URIs are read too.

        Raises:
            MediaError: the name leaves the root, nothing is there, or such names are not read.
        """
        if isinstance(ref, bytes):
            return open_source(ref)
        name = str(ref)
        if name[:8].lower().startswith(ADDRESSES):
            if not self.remote and name[:5].lower() != "data:":
                raise MediaError("addresses are not read here", where=shown(name))
            return open_source(name, limits=self.limits)
        if not self.files:
            raise MediaError("files are not read here", where=shown(name))
        try:
            source = open_source(self.find(self._path_of(name)))
        except MediaError as error:
            if self.limits.allowed is None:
                raise
            raise MediaError(error.what, where=shown(name)) from error
        return source if self.limits.allowed is None else replace(source, ref=name)

    def _path_of(self, name: str) -> str:
        """The path that a `file:` URI means, from the root where it lies in that."""
        if name[:5].lower() != "file:":
            return name
        rest = name[5:]
        if rest.startswith("//"):  # a host, which is this one
            rest = "/" + rest[2:].partition("/")[2]
        path = Path(unquote(rest))
        base = self._base()
        return str(path.relative_to(base) if path.is_relative_to(base) else path)


def _with_prefix(path: Path, base: Path, prefix: str) -> Path:
    if prefix:
        return path if path.name.startswith(prefix) else path.with_name(prefix + path.name)
    for split in ("val", "train"):
        # COCO's own name of the folder, and the one that LLaVA's instructions give it
        if base.name.endswith((f"{split}2014", f"2014_{split}")) and not path.exists():
            prefixed = path.with_name(f"COCO_{split}2014_{path.name}")
            if prefixed.exists():
                return prefixed
    return path

"""What the user asked for, as a list of files to fetch, and whether a file is the one asked for.

A hub repository stays one item here, since its files are known to the hub alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from chatbind_cli.download.catalogue import Entry, look_up
from chatbind_cli.errors import DownloadError, UsageError
from chatbind_cli.files import sha256_file
from chatbind_cli.urls import check_url, public_url

# By what a file is known: `sha256`, `md5`, or `git-sha1`, its name in Git, as the hub lists files
# that are not in large-file storage; and the hex digits.
Checksum = tuple[str, str]

_REPO = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_HUB_WORD = re.compile(
    rf"hf:(?P<kind>(?:datasets|models)/)?(?P<repo>{_REPO})(?:@(?P<rev>[^/]+))?(?:/(?P<file>.+))?"
)
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubRef:
    """A repository on the hub, or one file of it.

    Attributes:
        repo: `owner/name`.
        kind: `model` or `dataset`.
        revision: branch, tag or commit; None for the default branch.
        file: path in the repository; None for all of it.
    """

    repo: str
    kind: str = "model"
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        """The way `parse_hub_ref` reads it."""
        prefix = "datasets/" if self.kind == "dataset" else ""
        revision = f"@{self.revision}" if self.revision else ""
        file = f"/{self.file}" if self.file else ""
        return f"hf:{prefix}{self.repo}{revision}{file}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One file to fetch, or one whole hub repository.

    Attributes:
        name: what the user called it.
        path: the file, or for a repository the folder, that it goes to.
        hub: where on the hub, or None for a URL.
        url: where on the web, or None for the hub.
        bytes: size that it must have, where it is known.
        checksum: digest that it must have, where it is known.
        unpack: for an archive: the folder to unpack it into; None leaves it as it is. For a
            repository: the folder for all archives in it.
        include: for a repository, the file patterns that are wanted; all if empty.
        about: size in words.
    """

    name: str
    path: Path
    hub: HubRef | None = None
    url: str | None = None
    bytes: int | None = None
    checksum: Checksum | None = None
    unpack: Path | None = None
    include: tuple[str, ...] = ()
    about: str | None = None

    @property
    def source(self) -> str:
        """Where it comes from, for records and messages."""
        return str(self.hub) if self.hub is not None else public_url(str(self.url))

    @property
    def is_repository(self) -> bool:
        """Whether it stands for all files of a repository."""
        return self.hub is not None and self.hub.file is None

    @property
    def place(self) -> tuple[Path, str]:
        """The folder whose manifest it is in, and its path below that."""
        if self.hub is None or self.hub.file is None:
            return self.path.parent, self.path.name
        name = self.hub.file
        return self.path.parents[len(PurePosixPath(name).parts) - 1], name

    def file(self, name: str, revision: str | None = None) -> Request:
        """Of a request for a repository, the one for a file of it.

        Raises:
            UsageError: its name leads out of the folder.
        """
        assert self.hub is not None
        _refuse_outside(name, self.source)
        path = self.path / name
        return replace(
            self,
            path=path,
            hub=replace(self.hub, file=name, revision=revision or self.hub.revision),
            unpack=path.parent if self.unpack is not None and _is_archive(path) else None,
        )

    def check(self, path: Path | None = None, *, fresh: bool = False) -> str:
        """Compares a file, at `path` until it gets its name, with what is known of it.

        With `fresh` it is read whatever is remembered of its hash.

        Returns:
            What was compared: `sha256`, `git-sha1`, `md5`, `bytes` or `nothing`.

        Raises:
            DownloadError: it differs.
        """
        path = path or self.path
        found = path.stat().st_size
        if self.bytes not in (None, found):
            raise DownloadError(
                f"has {found} bytes in place of {self.bytes}", where=self.source, hint=_AGAIN
            )
        if self.checksum is None:
            return "nothing" if self.bytes is None else "bytes"
        kind, wanted = self.checksum
        digest = sha256_file(path, fresh=fresh) if kind == "sha256" else _digest(path, kind)
        if digest != wanted.lower():
            raise DownloadError(
                f"has the {_IN_WORDS[kind]} {digest[:12]}... in place of {wanted[:12].lower()}...",
                where=self.source,
                hint=_AGAIN,
            )
        return kind


_AGAIN = "fetch it again; if it stays so, the source has changed"
_IN_WORDS = {"sha256": "SHA-256", "git-sha1": "Git hash", "md5": "MD5"}


def _digest(path: Path, kind: str) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    if kind == "git-sha1":
        head = f"blob {path.stat().st_size}\0".encode()
        digest = hashlib.sha1(head, usedforsecurity=False)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest()


def is_repo_id(word: str) -> bool:
    """Whether a word has the form of a hub repository, `owner/name`."""
    return re.fullmatch(_REPO, word) is not None


def parse_hub_ref(word: str) -> HubRef:
    """Reads `hf:[datasets/]owner/name[@revision][/file]`.

    Raises:
        UsageError: it is not of that form.
    """
    match = _HUB_WORD.fullmatch(word)
    if match is None:
        raise UsageError(
            f"cannot read {word!r}", hint="write hf:owner/name, hf:owner/name@revision/file, ..."
        )
    file = match["file"]
    if file is not None:
        _refuse_outside(file, word)
    return HubRef(
        repo=match["repo"],
        kind="dataset" if (match["kind"] or "").startswith("datasets") else "model",
        revision=unquote(match["rev"]) if match["rev"] else None,
        file=file,
    )


def requests_for(
    words: Sequence[str], output: Path, *, unpack: bool = False, include: Sequence[str] = ()
) -> list[Request]:
    """Turns the words of the call into requests.

    A word is a name of the catalogue, an `hf:` reference, or a URL (with `#sha256=...`, the hash
    that the file must have). `unpack` and `include`, the patterns of the files that are wanted of a
    repository, are for what the catalogue does not name; it says these itself.

    Raises:
        UsageError: a word is none of these, two of them want the same path, or there is nothing
            to unpack or to choose from.
    """
    found: list[Request] = []
    for word in words:
        found += _requests_of(word, output, unpack, tuple(include))
    if include and not any(request.include and request.is_repository for request in found):
        raise UsageError("--include chooses from hf: repositories, and none is named")
    if unpack and not any(request.unpack for request in found):
        raise UsageError("there is no archive among what is named, so nothing to --unpack")
    by_path: dict[Path, Request] = {}
    for request in found:
        other = by_path.setdefault(request.path, request)
        if (other.source, other.checksum) != (request.source, request.checksum):
            raise UsageError(f"{other.name} and {request.name} would both become {request.path}")
    return list(by_path.values())


def entry_requests(entry: Entry, output: Path) -> list[Request]:
    """The requests for a catalogue entry."""
    folder = output / entry.folder
    hub = parse_hub_ref(f"hf:{entry.hub}") if entry.hub is not None else None
    if not entry.files:
        return [
            Request(name=entry.name, path=folder, hub=hub, include=entry.include, about=entry.about)
        ]
    return [
        Request(
            name=entry.name,
            path=folder / file["to"],
            hub=_hub_of(file, hub),
            url=file.get("url"),
            bytes=file.get("bytes"),
            checksum=next(((k, file[k]) for k in ("sha256", "md5") if k in file), None),
            unpack=folder / file["unpack"] if "unpack" in file else None,
            about=file.get("about"),
        )
        for file in entry.files
    ]


def _hub_of(file: Mapping[str, Any], whole: HubRef | None) -> HubRef | None:
    """Where on the hub a file of an entry is, or the repository that stands in place of a file."""
    if "hub" in file:
        return parse_hub_ref(f"hf:{file['hub']}")
    return replace(whole, file=file["path"]) if whole is not None else None


def _requests_of(word: str, output: Path, unpack: bool, include: tuple[str, ...]) -> list[Request]:
    if word.startswith("hf:"):
        ref = parse_hub_ref(word)
        path = output / (ref.repo.rpartition("/")[2] if ref.file is None else ref.file)
        request = Request(name=word, path=path, hub=ref, include=include)
    elif word.startswith(("http://", "https://")):
        check_url(word)
        url, checksum = _without_digest(word)
        path = output / _url_name(url)
        request = Request(name=public_url(url), path=path, url=url, checksum=checksum)
    else:
        return entry_requests(look_up(word), output)
    if unpack and request.is_repository:
        return [replace(request, unpack=request.path)]
    return [replace(request, unpack=path.parent)] if unpack and _is_archive(path) else [request]


def _without_digest(url: str) -> tuple[str, Checksum | None]:
    """A URL and the digest that its fragment gives, as in `https://...#sha256=0123...`."""
    bare, _, fragment = url.partition("#")
    if not fragment.startswith("sha256="):
        return url, None
    digest = fragment.removeprefix("sha256=").lower()
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise UsageError(f"{fragment!r} is no SHA-256", hint="it has 64 hexadecimal digits")
    return bare, ("sha256", digest)


def _is_archive(path: Path) -> bool:
    """Whether a file is an archive by its name."""
    return path.name.lower().endswith(_ARCHIVES)


def _url_name(url: str) -> str:
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    if not name:
        raise UsageError(f"{url!r} names no file")
    _refuse_outside(name, url)
    return name


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file's name is one that any of the patterns means."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def leads_out(name: str) -> bool:
    """Whether a name would leave its folder; hosts, repositories and archives may say anything."""
    path = PurePosixPath(name)
    drive = name[1:2] == ":"
    return path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or drive


def _refuse_outside(name: str, word: str) -> None:
    if leads_out(name):
        raise UsageError(f"{word!r} names a path outside its folder")

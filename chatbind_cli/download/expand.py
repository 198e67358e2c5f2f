"""What is known of each file before it is fetched: the files of a repository, sizes and hashes.

Asks the hub, and notes what is wanted of a repository, so that what has not come is missed.
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch
from os.path import lexists

from chatbind_cli.download.hub import Hub
from chatbind_cli.download.presence import is_present, receipts_of_repository
from chatbind_cli.download.receipts import NOTES, Notes, place_of, wanted_receipt
from chatbind_cli.download.wanted import HubRef, Request, is_archive, refuse_outside
from chatbind_cli.errors import DownloadError

FETCH_IT = "run it without --verify"


def expand(
    request: Request, hub: Hub, notes: Notes, *, verify: bool, overwrite: bool
) -> list[Request]:
    """A repository's files; anything else is one file, with what is known of it.

    Args:
        request: what was asked for.
        hub: is asked for listings, sizes and hashes.
        notes: what came before; what is wanted of a repository is added.
        verify: whether only what is here is meant; the hub is not asked then.
        overwrite: whether what is here counts for nothing.

    Raises:
        DownloadError: a repository cannot be listed, or is not here.
    """
    ref = request.hub
    if ref is None:
        return [request]
    if not request.is_repository:
        return [request if verify else _with_facts(request, ref, hub, notes, overwrite)]
    here = hub.offline and not overwrite and is_present(request, notes)
    if verify or here:
        return _here_of(request, ref, notes)
    files, commit = hub.files(ref, request.include)
    if not files:
        raise DownloadError("has no file that is wanted", where=request.source)
    expanded = []
    for file in files:
        refuse_outside(file.path, request.source)
        # All files come from the commit that was listed, even if the branch moves meanwhile.
        pinned = HubRef(repo=ref.repo, kind=ref.kind, revision=commit, file=file.path)
        one = _of_repository(request, pinned)
        expanded.append(replace(one, bytes=file.bytes, sha256=file.sha256, git_sha1=file.git_sha1))
    known = notes.below(request.path)
    # What is there without a note is somebody's own, and must not come to look like ours.
    new = [one for one in expanded if place_of(one)[1] not in known and not lexists(one.path)]
    notes.add(request.path, [wanted_receipt(one) for one in new])
    return expanded


def _of_repository(request: Request, ref: HubRef) -> Request:
    """A request for one file out of a request for all of them."""
    path = request.path / (ref.file or "")
    unpacked = path.parent if request.unpack is not None and is_archive(path) else None
    return replace(request, path=path, hub=ref, unpack=unpacked)


def _here_of(request: Request, ref: HubRef, notes: Notes) -> list[Request]:
    """The files of a repository that came, or were to come, or else are in its folder."""
    names = [receipt.path for receipt in receipts_of_repository(request, notes)]
    if not names:
        below = (path.relative_to(request.path) for path in sorted(request.path.rglob("*")))
        names = [path.as_posix() for path in below if path.parts[0] not in (".cache", NOTES)]
        names = [name for name in names if (request.path / name).is_file()]
    if request.include:
        names = [name for name in names if any(fnmatch(name, p) for p in request.include)]
    if not names:
        raise DownloadError("is not here", where=str(request.path), hint=FETCH_IT)
    return [_of_repository(request, replace(ref, file=name)) for name in names]


def _with_facts(request: Request, ref: HubRef, hub: Hub, notes: Notes, overwrite: bool) -> Request:
    """A request for a file of the hub with size and hash, so that what comes can be verified."""
    receipt = notes.of(request)
    here = not overwrite and is_present(request, notes)
    if here and receipt is not None and receipt.source == request.source:
        known = request.sha256 or receipt.sha256
        return replace(request, sha256=known, git_sha1=None if known else receipt.git_sha1)
    if request.sha256 is not None:
        return request
    facts = hub.file(ref)
    if facts is None:
        return request
    size = request.bytes if request.bytes is not None else facts.bytes
    return replace(request, bytes=size, sha256=facts.sha256, git_sha1=facts.git_sha1)

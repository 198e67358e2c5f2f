"""Files and repositories of the Hugging Face hub, through the hub's own library.

That library brings the cache, tokens, `HF_ENDPOINT`, `HF_HUB_OFFLINE`, resume and Xet; here its
failures become one line that says what to do.
"""

from __future__ import annotations

import errno
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

import huggingface_hub  # noqa: TID253  this module is imported once something is fetched
from huggingface_hub import errors as hub_errors  # noqa: TID253
from huggingface_hub.utils import tqdm as hub_tqdm  # type: ignore[attr-defined]  # noqa: TID253

import chatbind_cli
from chatbind_cli.download.manifest import OURS
from chatbind_cli.download.presence import has_weights
from chatbind_cli.download.requests import Checksum, HubRef, Request, matches
from chatbind_cli.download.web import AGAIN, RETRIED_STATUS
from chatbind_cli.errors import DownloadError, reason
from chatbind_cli.files import replace_file

# The base of all failures of the HTTP client that the hub's library uses, whichever that is.
_HTTP_ERROR: type[Exception] = hub_errors.HTTPError  # type: ignore[attr-defined]

_US: dict[str, Any] = {  # for the hub's log of who asks
    "library_name": "chatbind",
    "library_version": chatbind_cli.__version__,
}

# Copies of the same weights for other programs, and the repository's own housekeeping.
_NEVER = ("*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.ot", ".gitattributes", "*.md5", "*.sha256")
_BIN = ("*.bin", "*.bin.index.json", "*.pth", "*.pt")


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` says that the hub is not to be asked."""
    return bool(huggingface_hub.is_offline_mode())


# A commit, and of each file in it by name what is known.
Listing = tuple[str, dict[str, tuple[int | None, Checksum | None]]]


class Hub:
    """The hub, or offline its cache; asked for the files of each repository once."""

    def __init__(self) -> None:
        self._listings: dict[HubRef, Listing] = {}

    def files(self, request: Request) -> list[Request]:
        """The files of a repository that are wanted, all of one commit, with size and hash.

        Without patterns: all but copies for other programs; where weights are there as
        safetensors, their `.bin` twins count as such copies. Of a request for one file: that file
        alone, or nothing where there is none of that name.

        Raises:
            DownloadError: the repository cannot be reached, or is not for this user.
        """
        assert request.hub is not None
        commit, files = self.listing(replace(request.hub, file=None), request.include)
        if request.hub.file is not None:
            known = files.get(request.hub.file)
            return [replace(request, bytes=known[0], checksum=known[1])] if known else []
        # All files come from the commit that was listed, even if the branch moves meanwhile.
        return [
            replace(request.file(name, commit), bytes=files[name][0], checksum=files[name][1])
            for name in _wanted(files, request.include)
        ]

    def listing(self, ref: HubRef, include: Sequence[str] = ()) -> Listing:
        """The commit and the files of a repository.

        Raises:
            DownloadError: it cannot be reached, or is not for this user.
        """
        if is_offline():
            return _cached_listing(ref, include)
        if ref not in self._listings:
            api = huggingface_hub.HfApi(**_US)
            call = partial(
                api.repo_info,
                ref.repo,
                repo_type=ref.kind,
                revision=ref.revision,
                files_metadata=True,
                timeout=30,
            )
            with _explained(ref):
                info = _patiently(call)
            files: dict[str, tuple[int | None, Checksum | None]] = {}
            for file in info.siblings or ():
                checksum = ("git-sha1", file.blob_id) if file.blob_id is not None else None
                if file.lfs is not None:  # it is in large-file storage
                    checksum = ("sha256", file.lfs.sha256)
                files[file.rfilename] = file.size, checksum
            self._listings[ref] = info.sha, files
        return self._listings[ref]

    def fetch(
        self, ref: HubRef, folder: Path, *, advance: Callable[[int], None] = lambda n: None
    ) -> Path:
        """Fetches one file to its path below a folder, resuming what an earlier call began.

        `advance` is called with the number of bytes that have come.

        Raises:
            DownloadError: it cannot be had.
        """
        target = folder / (ref.file or "")
        with _explained(ref):
            call = partial(
                huggingface_hub.hf_hub_download,
                ref.repo,
                ref.file or "",
                repo_type=ref.kind,
                revision=ref.revision,
                tqdm_class=_counting_bar(advance),
                **_US,
            )
            if not is_offline():
                return Path(call(local_dir=folder))
            with replace_file(target) as temporary:  # the hub's cache is not ours to move
                shutil.copyfile(call(local_files_only=True), temporary)
        return target


def fetch_snapshot(ref: HubRef) -> Path:
    """The folder of a repository in the hub's cache: what `--delta owner/name` means.

    With `HF_HUB_OFFLINE`, what is in the cache already.

    Raises:
        DownloadError: it cannot be had.
    """
    _, files = Hub().listing(ref)
    return snapshot(ref, names=_wanted(files, ()))


def snapshot(
    ref: HubRef,
    *,
    names: Sequence[str] | None = None,
    advance: Callable[[int], None] = lambda n: None,
    here: bool = False,
    **patterns: Any,
) -> Path:
    """Files of a repository in the hub's cache, as the hub's library puts them there.

    Several processes may ask at once: the library's locks let one of them fetch a file.

    Args:
        ref: the repository.
        names: which files; None: see `patterns`.
        advance: called with the number of bytes that have come.
        here: fetch nothing.
        **patterns: the library's `allow_patterns` and `ignore_patterns`.

    Raises:
        DownloadError: they cannot be had; with `HF_HUB_OFFLINE`, they are not all there.
    """
    if names is not None:
        patterns["allow_patterns"] = [escape(name) for name in names]
    with _explained(ref):
        return Path(
            huggingface_hub.snapshot_download(
                ref.repo,
                repo_type=ref.kind,
                revision=ref.revision,
                local_files_only=here or is_offline(),
                tqdm_class=_counting_bar(advance),
                **patterns,
                **_US,
            )
        )


def _cached_listing(ref: HubRef, include: Sequence[str]) -> Listing:
    """The files of a repository that an earlier program has left in the hub's cache.

    Raises:
        DownloadError: it is not there, or not whole.
    """
    unwanted = None if include else [*_NEVER, *_BIN]
    folder = snapshot(ref, allow_patterns=list(include) or None, ignore_patterns=unwanted)
    if ref.kind == "model" and not has_weights(folder):
        raise DownloadError(NOT_HERE[0], where=str(ref), hint=NOT_HERE[1])
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return folder.name, {p.relative_to(folder).as_posix(): (p.stat().st_size, None) for p in paths}


def _wanted(names: Iterable[str], include: Sequence[str]) -> list[str]:
    """The names that match a pattern; without patterns, all but copies. Our notes are no one's."""
    names = [name for name in names if name.partition("/")[0].casefold() not in OURS]
    if include:
        return [name for name in names if matches(name, include)]
    safe = any(name.endswith(".safetensors") for name in names)
    unwanted = (*_NEVER, *_BIN) if safe else _NEVER
    return [name for name in names if not matches(name, unwanted)]


def _counting_bar(advance: Callable[[int], None]) -> type[Any]:
    """A progress bar for the hub's library that draws nothing and counts for us."""

    class Counting(hub_tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["disable"] = True
            # one bar counts what is written, another, for some transfers, the same on its way
            transfer = str(kwargs.get("name")).endswith(".transfer")
            self._counts = kwargs.get("unit") == "B" and not transfer
            self._tell(kwargs.get("initial"))  # what an earlier run has fetched
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            self._tell(n)
            return None

        def _tell(self, n: float | None) -> None:
            if self._counts:
                advance(int(n or 0))

    return Counting


def _patiently(call: Callable[[], Any]) -> Any:
    """Calls the hub, again after a while where it is busy or does not answer.

    The hub's library waits for a busy hub when it fetches, and not when it lists.
    """
    for wait_s in (0.5, 2.0, 6.0):
        try:
            return call()
        except _HTTP_ERROR as error:
            response = getattr(error, "response", None)
            if response is not None and response.status_code not in RETRIED_STATUS:
                raise
        # The jitter keeps parallel programs from knocking all at once.
        time.sleep(wait_s * random.uniform(0.7, 1.3))  # noqa: S311
    return call()


_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
_STATUS_HINTS = {
    401: "the token is wrong or expired: `hf auth login`, or set HF_TOKEN",
    403: "the token may not read it: make one that may, or ask its owner",
    429: f"too many requests: wait a minute, or {_LOG_IN}",
}
_NO_NETWORK = (
    "check the network and HF_ENDPOINT, and run the same command again; HF_HUB_OFFLINE=1 takes "
    "what is in the hub's cache"
)
NOT_HERE = (
    "is not on this machine, or not all of it, and HF_HUB_OFFLINE is set",
    "unset it, or fetch it where there is a network",
)


@contextmanager
def _explained(ref: HubRef) -> Iterator[None]:
    """Turns the hub library's failures into one line with the next step; a full disk stays one."""
    try:
        yield
    except (_HTTP_ERROR, hub_errors.XetDownloadError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        what, hint = _what_and_hint(error, ref)
        raise DownloadError(what, where=str(ref), hint=hint) from error


def _what_and_hint(error: Exception, ref: HubRef) -> tuple[str, str]:
    page = f"https://huggingface.co/{'datasets/' if ref.kind == 'dataset' else ''}{ref.repo}"
    match error:
        case hub_errors.GatedRepoError():
            return "is open only to those whom its owner lets in", f"ask on {page}, then {_LOG_IN}"
        case hub_errors.RepositoryNotFoundError():
            hint = "check the name; a private one needs `hf auth login` or HF_TOKEN"
            return "there is no such repository, or it is not open to you", hint
        case hub_errors.RevisionNotFoundError():
            return f"has no revision {ref.revision!r}", f"see {page}"
        case hub_errors.RemoteEntryNotFoundError():
            return "there is no such file", f"see {page}"
        case hub_errors.LocalEntryNotFoundError() | hub_errors.OfflineModeIsEnabled():
            if is_offline():
                return NOT_HERE
            return f"cannot be reached ({reason(error.__cause__ or error)})", _NO_NETWORK
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None and isinstance(error, _HTTP_ERROR):
        return f"cannot be reached ({reason(error)})", _NO_NETWORK
    if status is None:
        return f"could not be fetched ({reason(error)})", AGAIN
    return f"the hub says {status}", _STATUS_HINTS.get(status, f"{AGAIN}, in a while")

"""Files and repositories of the Hugging Face hub, through the hub's own library.

That library brings the cache, tokens, `HF_ENDPOINT`, `HF_HUB_OFFLINE`, resume and Xet; here its
failures become one line that says what to do.
"""

from __future__ import annotations

import errno
import fnmatch
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub  # noqa: TID253  this module is imported once something is fetched
from huggingface_hub import errors as hub_errors  # noqa: TID253
from huggingface_hub.utils import tqdm as hub_tqdm  # type: ignore[attr-defined]  # noqa: TID253

import chatbind_cli
from chatbind_cli.download.presence import has_weights
from chatbind_cli.download.wanted import HubRef
from chatbind_cli.errors import DownloadError
from chatbind_cli.files import replace_file

# The base of all failures of the HTTP client that the hub's library uses, whichever that is.
_HTTP_ERROR: type[Exception] = hub_errors.HTTPError  # type: ignore[attr-defined]

_US, _VERSION = "chatbind", chatbind_cli.__version__  # for the hub's log of who asks

# Copies of the same weights for other programs, and the repository's own housekeeping.
_NEVER = ("*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.ot", ".gitattributes", "*.md5", "*.sha256")
_BIN = ("*.bin", "*.bin.index.json", "*.pth", "*.pt")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file of a repository as the hub describes it.

    Attributes:
        path: in the repository.
        bytes: its size.
        sha256: of a file in large-file storage.
        git_sha1: the name in Git of any other.
    """

    path: str
    bytes: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None


class Hub:
    """The hub.

    Args:
        endpoint: its address, `HF_ENDPOINT` or the public one unless given.
    """

    def __init__(self, endpoint: str | None = None) -> None:
        self.endpoint = endpoint
        self._listings: dict[HubRef, tuple[list[HubFile], str | None]] = {}
        self._api = huggingface_hub.HfApi(
            endpoint=endpoint, library_name=_US, library_version=_VERSION
        )

    @property
    def offline(self) -> bool:
        """Whether `HF_HUB_OFFLINE` says that the hub is not to be asked."""
        return bool(huggingface_hub.is_offline_mode())

    def files(self, ref: HubRef, include: Sequence[str] = ()) -> tuple[list[HubFile], str | None]:
        """The files of a repository that are wanted, and the commit that they belong to.

        Without `include`: all but copies for other programs; where weights are there as
        safetensors, their `.bin` twins count as such copies.

        Raises:
            DownloadError: the repository cannot be reached or is not for this user.
        """
        found, commit = _cached_listing(ref, include) if self.offline else self._listing(ref)
        names = _wanted([file.path for file in found], include)
        return [file for file in found if file.path in names], commit

    def file(self, ref: HubRef) -> HubFile | None:
        """What the hub says of one file; None where it has none of that name, or is not asked.

        Raises:
            DownloadError: the repository cannot be reached or is not for this user.
        """
        if self.offline:
            return None  # only what the cache has could be said, and that is not the whole
        found, _ = self._listing(replace(ref, file=None))
        return next((file for file in found if file.path == ref.file), None)

    def _listing(self, ref: HubRef) -> tuple[list[HubFile], str | None]:
        """All files of a repository, and the commit; asked for once."""
        if ref not in self._listings:
            self._listings[ref] = self._asked_listing(ref)
        return self._listings[ref]

    def _asked_listing(self, ref: HubRef) -> tuple[list[HubFile], str | None]:
        with _explained(ref):
            info = _patiently(
                partial(
                    self._api.repo_info,
                    ref.repo,
                    repo_type=ref.kind,
                    revision=ref.revision,
                    files_metadata=True,
                    timeout=30,
                )
            )
        files = []
        for sibling in getattr(info, "siblings", None) or ():
            sha256 = sibling.lfs.sha256 if sibling.lfs is not None else None
            git_sha1 = sibling.blob_id if sibling.lfs is None else None
            files.append(
                HubFile(
                    path=sibling.rfilename, bytes=sibling.size, sha256=sha256, git_sha1=git_sha1
                )
            )
        return files, info.sha

    def fetch(
        self,
        ref: HubRef,
        folder: Path,
        *,
        advance: Callable[[int], None] = lambda n: None,
    ) -> Path:
        """Fetches one file, resuming what an earlier call began.

        Args:
            ref: names a file.
            folder: where the file goes, under its path in the repository.
            advance: called with the number of bytes that have come.

        Returns:
            Where it is.

        Raises:
            DownloadError: it cannot be had.
        """
        if self.offline:
            return _from_cache(ref, folder)
        with _explained(ref):
            path = huggingface_hub.hf_hub_download(
                ref.repo,
                ref.file or "",
                repo_type=ref.kind,
                revision=ref.revision,
                local_dir=folder,
                endpoint=self.endpoint,
                library_name=_US,
                library_version=_VERSION,
                tqdm_class=_counting_bar(advance),
            )
        return Path(str(path))


def _cached_listing(ref: HubRef, include: Sequence[str]) -> tuple[list[HubFile], str | None]:
    """The files of a repository that an earlier program has left in the hub's cache.

    Raises:
        DownloadError: it is not there, or not whole.
    """
    with _explained(ref):
        folder = Path(
            huggingface_hub.snapshot_download(
                ref.repo,
                repo_type=ref.kind,
                revision=ref.revision,
                allow_patterns=list(include) or None,
                ignore_patterns=None if include else [*_NEVER, *_BIN],
                local_files_only=True,
            )
        )
    if ref.kind == "model" and not has_weights(folder):
        raise _not_here_offline(str(ref))
    files = []
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        # The cache links to each content under the name of its hash.
        digest = path.resolve().name
        sha256 = digest if re.fullmatch("[0-9a-f]{64}", digest) else None
        git_sha1 = digest if re.fullmatch("[0-9a-f]{40}", digest) else None
        name, size = path.relative_to(folder).as_posix(), path.stat().st_size
        files.append(HubFile(path=name, bytes=size, sha256=sha256, git_sha1=git_sha1))
    return files, folder.name


def _from_cache(ref: HubRef, folder: Path) -> Path:
    """Copies a file out of the hub's cache, where the hub itself is not to be asked."""
    with _explained(ref):
        cached = huggingface_hub.hf_hub_download(
            ref.repo,
            ref.file or "",
            repo_type=ref.kind,
            revision=ref.revision,
            local_files_only=True,
        )
        path = folder / (ref.file or "")
        with replace_file(path) as temporary:
            shutil.copyfile(cached, temporary)
    return path


def fetch_snapshot(repo: str, *, revision: str | None = None, endpoint: str | None = None) -> Path:
    """A whole model repository in the hub's cache: what `--delta owner/name` means.

    With `HF_HUB_OFFLINE`, what is in the cache already.

    Returns:
        The snapshot's folder.

    Raises:
        DownloadError: it cannot be had.
    """
    ref = HubRef(repo=repo, revision=revision)
    offline = huggingface_hub.is_offline_mode()
    unwanted = [*_NEVER, *_BIN]
    if not offline:
        files, _ = Hub(endpoint).files(ref)
        if any(fnmatch.fnmatch(file.path, pattern) for file in files for pattern in _BIN):
            unwanted = [*_NEVER]
    with _explained(ref):
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            ignore_patterns=unwanted,
            endpoint=endpoint,
            library_name=_US,
            library_version=_VERSION,
            local_files_only=offline,
            tqdm_class=_counting_bar(lambda n: None),
        )
    return Path(folder)


def _wanted(names: Sequence[str], include: Sequence[str]) -> set[str]:
    if include:
        return {name for name in names if any(fnmatch.fnmatch(name, p) for p in include)}
    safe = any(name.endswith(".safetensors") for name in names)
    unwanted = (*_NEVER, *_BIN) if safe else _NEVER
    return {name for name in names if not any(fnmatch.fnmatch(name, p) for p in unwanted)}


def _counting_bar(advance: Callable[[int], None]) -> type[Any]:
    """A progress bar for the hub's library that draws nothing and counts for us."""

    class Counting(hub_tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["disable"] = True
            advance(int(kwargs.get("initial") or 0))  # what an earlier run has fetched
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            advance(int(n or 0))
            return None

    return Counting


def _patiently(call: Callable[[], Any]) -> Any:
    """Calls the hub, again after a while where it is busy or does not answer.

    The hub's library waits for a busy hub when it fetches, and not when it lists.
    """
    for wait_s in (*_WAITS_S, None):
        try:
            return call()
        except _HTTP_ERROR as error:
            response = getattr(error, "response", None)
            status = response.status_code if response is not None else None
            if wait_s is None or status not in _RETRIED_STATUS:
                raise
        # The jitter keeps parallel programs from knocking all at once.
        time.sleep(wait_s * random.uniform(0.7, 1.3))  # noqa: S311
    raise AssertionError("the last round returns or raises")


_WAITS_S = (0.5, 2.0, 6.0)
# None: no answer at all.
_RETRIED_STATUS = frozenset({None, 408, 425, 429, 500, 502, 503, 504})


@contextmanager
def _explained(ref: HubRef) -> Iterator[None]:
    """Turns the hub library's failures into one line with the next step."""
    page = f"https://huggingface.co/{'datasets/' if ref.kind == 'dataset' else ''}{ref.repo}"
    where = str(ref)
    try:
        yield
    except hub_errors.GatedRepoError as error:
        raise DownloadError(
            "is open only to those whom its owner lets in",
            where=where,
            hint=f"ask on {page}, then log in with `hf auth login` or set HF_TOKEN",
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise DownloadError(
            "there is no such repository, or it is not open to you",
            where=where,
            hint="check the name; a private one needs `hf auth login` or HF_TOKEN",
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise DownloadError(
            f"has no revision {ref.revision!r}", where=where, hint=f"see {page}"
        ) from error
    except hub_errors.RemoteEntryNotFoundError as error:
        raise DownloadError("there is no such file", where=where, hint=f"see {page}") from error
    except hub_errors.OfflineModeIsEnabled as error:
        raise _not_here_offline(where) from error
    except hub_errors.LocalEntryNotFoundError as error:
        if huggingface_hub.is_offline_mode():
            raise _not_here_offline(where) from error
        raise DownloadError(
            f"cannot be reached ({_root_reason(error)})",
            where=where,
            hint="check the network and HF_ENDPOINT, and run the same command again",
        ) from error
    except hub_errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        raise DownloadError(
            f"the hub says {status}" if status else _line(error),
            where=where,
            hint=_STATUS_HINTS.get(status or 0, "run the same command again in a while"),
        ) from error
    except (_HTTP_ERROR, hub_errors.XetDownloadError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(
                f"cannot be written ({error.strerror})",
                where=where,
                hint="make room and run the same command again: it goes on where it stopped",
            ) from error
        raise DownloadError(
            f"could not be fetched ({_line(error)})",
            where=where,
            hint="run the same command again: it goes on where it stopped",
        ) from error


def _not_here_offline(where: str) -> DownloadError:
    return DownloadError(
        "is not on this machine, or not all of it, and HF_HUB_OFFLINE is set",
        where=where,
        hint="unset it, or fetch it where there is a network",
    )


_STATUS_HINTS = {
    401: "the token is wrong or expired: `hf auth login`, or set HF_TOKEN",
    403: "the token may not read it: make one that may, or ask its owner",
    429: "too many requests: wait a minute, or log in with `hf auth login`",
}


def _line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return text[:200] or type(error).__name__


def _root_reason(error: BaseException) -> str:
    cause = error.__cause__
    return _line(cause) if cause is not None else _line(error)

"""Where the files of a hub repository lie that an encoder is opened from: here, or in the cache.

Of a repository only the settings, the vocabulary and one form of the weights are fetched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import huggingface_hub  # noqa: TID253  this module is imported once something is fetched

from chatbind_cli.console import Progress, note
from chatbind_cli.download.catalogue import entries
from chatbind_cli.download.hub import NOT_HERE, Hub, is_offline, snapshot
from chatbind_cli.download.manifest import Manifest
from chatbind_cli.download.presence import has_weights, is_present
from chatbind_cli.download.requests import (
    HubRef,
    Request,
    entry_requests,
    matches,
    parse_hub_ref,
)
from chatbind_cli.errors import DownloadError, UsageError
from chatbind_cli.files import size_in_words

# Settings, the page that names the licence, and all that makes a tokenizer: an encoder is known by
# the hash of that, too, so it has to be the same whoever fetched it.
_TEXTS = (
    *("*config*.json", "README.md", "chat_template.*", "*.model", "*.bpe*", "spiece*"),
    *("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*"),
)
# The first form of which there is something; an index only with what it names.
_WEIGHTS = (
    ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    ("*.safetensors",),
    ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"),
    ("*.pth",),
)
_NEVER = ("*/*", "training_args.bin")
_NOT_ASKED_FOR = (
    "is not on this machine, and is fetched for those alone who name it",
    "if you trust who made the model, name it with --encoder",
)


def encoder_folder(word: str, *, fetch: bool = True) -> Path:
    """The folder with the files of `hf:owner/name[@revision]` that an encoder needs.

    What `chatbind download` has put below the working folder comes first, if it is whole; then the
    hub's cache, to which what is missing is fetched. Without `fetch`, or with `HF_HUB_OFFLINE`,
    what the cache has.

    Raises:
        UsageError: the word names no model repository.
        DownloadError: the files cannot be had, or there are no weights among them.
    """
    ref = parse_hub_ref(word)
    if ref.file is not None or ref.kind != "model":
        raise UsageError(
            f"{word!r} is no model repository", hint="an encoder is named hf:OWNER/NAME[@REVISION]"
        )
    here = next(_here(ref), None)
    if here is not None:
        return here
    if fetch and not is_offline():
        return _fetched(ref)
    folder = _cached(ref)
    if folder is not None:
        return folder
    what, hint = NOT_HERE if is_offline() else _NOT_ASKED_FOR
    raise DownloadError(what, where=str(ref), hint=hint)


def _here(ref: HubRef) -> Iterator[Path]:
    """Folders of the working folder that hold the repository, by the notes of `download`."""
    name = ref.repo.rpartition("/")[2]
    places = [Request(name=name, path=Path(name), hub=ref)]
    for entry in entries().values():
        places += [place for place in entry_requests(entry, Path()) if place.hub == ref]
    manifest = Manifest()
    for place in places:
        noted = manifest.of_repository(place)
        # a branch may have moved since; a commit is what the notes say
        same = all(file.source.startswith(f"{ref}/") for file in noted) or ref.revision is None
        if noted and same and is_present(place, manifest) and has_weights(place.path):
            yield place.path


def _fetched(ref: HubRef) -> Path:
    commit, files = Hub().listing(ref)
    names = _chosen(files)
    if names is None:
        raise DownloadError("holds no weights of an encoder", where=str(ref))
    missing = [name for name in names if not _in_cache(ref, name, commit)]
    if not missing:
        return snapshot(ref, names=names)
    size = sum(files[name][0] or 0 for name in missing)
    note(f"fetching {ref} to the hub's cache: {len(missing)} files, {size_in_words(size)}")
    with Progress(size >> 20 or None, "fetching", "MiB") as progress:
        return snapshot(ref, names=names, advance=progress.advance_bytes)


def _in_cache(ref: HubRef, name: str, commit: str) -> bool:
    return isinstance(huggingface_hub.try_to_load_from_cache(ref.repo, name, revision=commit), str)


def _chosen(names: Iterable[str]) -> list[str] | None:
    """The files that are wanted; None where there are no weights."""
    own = [name for name in names if not matches(name, _NEVER)]
    for form in _WEIGHTS:
        weights = [name for name in own if matches(name, form)]
        if weights:
            return [name for name in own if matches(name, _TEXTS) and name not in weights] + weights
    return None


def _cached(ref: HubRef) -> Path | None:
    """What an earlier program has left in the hub's cache, if there is something."""
    for form in _WEIGHTS:
        wanted = [*_TEXTS, *form]
        with suppress(DownloadError):  # another form may be there
            folder = snapshot(ref, here=True, allow_patterns=wanted, ignore_patterns=list(_NEVER))
            if any(matches(path.name, form) for path in folder.iterdir()) and has_weights(folder):
                return folder
    return None

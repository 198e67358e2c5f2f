"""Media decoded, in the thread that asks or in processes of their own.

Threads share one interpreter's lock, so that many of them do not feed a GPU; and a file that
crashes a library takes along the process that it is decoded in.
"""

from __future__ import annotations

import os
import queue
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple

import torch

from chatbind_cli.data.media_items import MediaItem
from chatbind_cli.encoders.encoder import Decoded, Read, load_media
from chatbind_cli.errors import ChatBindError, MediaError, contained
from chatbind_cli.jsonl import legible
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.sniff import sniff
from chatbind_cli.media.source import MediaSource, shown

Recall = Callable[[str, str], torch.Tensor | None]
"""From a modality and the SHA-256 of a content to its embedding, if there is one already."""

Loaded = Decoded | Medium | ChatBindError
"""What the encoder takes, a medium with its embedding, or why there is none."""

DecodeIn = Literal["auto", "threads", "processes"]

FEW = 32
"""Media that threads have decoded before a process, which takes seconds to start, is up."""

_PATIENCE_S = 5.0


class Reading(NamedTuple):
    """How media are read: the modalities that the encoder knows, its way, and the options."""

    known: Sequence[str]
    read: Read
    options: MediaOptions

    def lacks(self, modality: str, where: str | None = None) -> MediaError:
        """The error of a medium that the encoder knows nothing of."""
        known = ", ".join(self.known)
        return MediaError(f"the encoder has no tower for {modality}, only for {known}", where=where)


def decode(
    medium: Medium,
    open_medium: Callable[[], MediaSource],
    reading: Reading,
    recall: Recall | None = None,
) -> Loaded:
    """Decodes a medium, unless its embedding is known already or it cannot be used.

    Args:
        medium: what it is called.
        open_medium: finds its bytes.
        reading: how it becomes a tensor.
        recall: asked before it is decoded, from several threads at once.
    """
    try:
        source = open_medium()
        modality = medium.modality or sniff(source)
        if modality not in reading.known:
            return reading.lacks(modality, source.name)
        sha256 = source.sha256  # hashed here, in the thread
        embedding = recall(modality, sha256) if recall else None
        if embedding is not None:
            return replace(medium, modality=modality, sha256=sha256, embedding=embedding)
        return load_media(reading.read, source, modality, reading.options)
    except Exception as error:
        return contained(error, where=shown(legible(medium.name)))


class Decoders:
    """Decodes media items in processes, one for each thread that calls it at the same time.

    An item whose process dies is an error like any other.

    Args:
        reading: how media become tensors.
        recall: asked before one is decoded.
        few: so many are decoded in the calling thread first.
    """

    def __init__(self, reading: Reading, recall: Recall | None, few: int = 0) -> None:
        self._reading = reading
        self._recall = recall
        self._few = few
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._all: set[_Process] = set()
        self._changing = Lock()
        self._closed = False

    def __call__(self, item: MediaItem) -> Loaded:
        """What `decode` makes of an item."""
        with self._changing:
            self._few -= 1
        if self._few >= 0 or not _travels(item.medium):
            return decode(item.medium, item.open, self._reading, self._recall)
        process = self._one()
        try:
            loaded = process.decode(item, self._recall)
        except (EOFError, OSError):
            with self._changing:
                self._all.discard(process)
            return MediaError(
                f"crashed what decodes it ({process.end()})", where=shown(legible(item.medium.name))
            )
        self._idle.put(process)
        return loaded

    def close(self) -> None:
        """Ends the processes, whatever they are at."""
        with self._changing:
            self._closed = True
            for process in self._all:
                process.stop()

    def _one(self) -> _Process:
        """One that waits for work, or a new one."""
        with suppress(queue.Empty):
            while True:
                process = self._idle.get_nowait()
                if process.is_alive():
                    return process
        with self._changing:
            if self._closed:
                raise EOFError
            process = _Process(self._reading)
            self._all.add(process)
            return process


class _Process:
    """One process that decodes, and the pipe to it."""

    def __init__(self, reading: Reading) -> None:
        # neither CUDA nor threads of this process live on in those of a server; what it imports
        # once, they have at once
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__, reading.read.__module__])
        self._pipe, theirs = context.Pipe()
        words = (theirs, str(Path.cwd()), reading)
        self._process = context.Process(target=_serve, args=words, daemon=True)
        self._process.start()
        theirs.close()

    def decode(self, item: MediaItem, recall: Recall | None) -> Loaded:
        """Has an item decoded.

        Raises:
            EOFError, OSError: the process is dead.
        """
        self._pipe.send((replace(item, carried={}), recall is not None))
        found = None
        while True:
            kind, *said = self._pipe.recv()
            if kind == "tensor":
                source, modality, array = said
                return Decoded(source, modality, torch.from_numpy(array))
            if kind == "known":
                return replace(said[0], embedding=found)
            if kind == "error":
                return said[0]
            assert recall is not None
            found = recall(*said)
            self._pipe.send(found is not None)

    def is_alive(self) -> bool:
        """Whether nobody has killed it."""
        return self._process.is_alive()

    def end(self) -> str:
        """Waits for the end of a process that is dying; what it died of."""
        self._process.join(_PATIENCE_S)
        self.stop()
        code = self._process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def stop(self) -> None:
        """Ends the process."""
        self._process.terminate()


def _travels(medium: Medium) -> bool:
    """Whether another process can find a medium by its name."""
    return not isinstance(medium.ref, bytes) and str(medium.ref) != "-"


def _serve(pipe: Connection, folder: str, reading: Reading) -> None:
    """Decodes what comes through a pipe, until that is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's goes to the parent, too
    os.chdir(folder)
    torch.set_num_threads(1)

    def recall(modality: str, sha256: str) -> torch.Tensor | None:
        pipe.send(("recall", modality, sha256))
        return torch.empty(0) if pipe.recv() else None

    while True:
        try:
            item, has_recall = pipe.recv()
        except (EOFError, OSError):
            return
        asked = recall if has_recall else None
        pipe.send(_message(decode(item.medium, item.open, reading, asked)))


def _message(loaded: Loaded) -> tuple[Any, ...]:
    """What was decoded, without what is of no use elsewhere, and as NumPy's array.

    A tensor would travel by a file descriptor, of which a process has few.
    """
    if isinstance(loaded, ChatBindError):
        return "error", loaded
    if isinstance(loaded, Medium):
        return "known", replace(loaded, embedding=None)
    source = loaded.source
    light = MediaSource(source.ref, source.path, None if source.path else b"")
    vars(light)["sha256"] = source.sha256
    return "tensor", light, loaded.modality, loaded.tensor.numpy()

"""Makes a target or a delta from two checkpoints in pieces, shard by shard.

Memory holds a few pieces of a few megabytes, whatever the size of the model. Two threads read
ahead, the caller's own adds, one writes and up to three hash what has passed: the work is bound by
SHA-256 and by the disk, and all of it runs outside Python's lock. Pieces are small enough to stay
in the processor's cache from the read to the write, and their memory is used again and again,
because the first touch of fresh memory costs as much as the sum itself.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from chatbind_cli.console import Progress
from chatbind_cli.errors import WeightsError
from chatbind_cli.weights.checkpoint import Checkpoint
from chatbind_cli.weights.delta import Plan, Step
from chatbind_cli.weights.threads import one_thread
from chatbind_cli.weights.writer import SafetensorsWriter, Shard, bytes_of

STREAMS = ("base", "other", "result")

_PIECE_BYTES = 2 << 20
_PIECES_READ_AHEAD = 4
_PIECES_IN_FLIGHT = 12


class Arithmetic(Protocol):
    """What is done to the elements that base and delta (or target) share."""

    def combine(
        self, step: Step, start: int, theirs: torch.Tensor, ours: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Puts the result for a 1-D piece that starts at element `start` of the tensor in `out`.

        Args:
            step: the tensor's step of the plan.
            start: position of the piece in the tensor.
            theirs: the base's elements.
            ours: the delta's (or target's) elements.
            out: of the dtype and length of `ours`.
        """
        ...

    def rotary(self, step: Step) -> torch.Tensor:
        """The whole buffer of rotary frequencies for a step that is one."""
        ...


@dataclass
class Hashes:
    """SHA-256 of the tensors that passed: of the base, of the other input, of the result."""

    base: dict[str, str] = field(default_factory=dict)
    other: dict[str, str] = field(default_factory=dict)
    result: dict[str, str] = field(default_factory=dict)

    def update(self, more: Hashes) -> None:
        """Takes over the hashes of another part."""
        self.base.update(more.base)
        self.other.update(more.other)
        self.result.update(more.result)


class _Slot:
    """Memory for one piece on its way: the base's elements, the other's and the result's."""

    def __init__(self) -> None:
        self._memory = {name: torch.empty(_PIECE_BYTES, dtype=torch.uint8) for name in STREAMS}
        self.busy: list[Future[Any]] = []

    def view(self, stream: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return self._memory[stream][: numel * dtype.itemsize].view(dtype)

    def wait(self) -> None:
        for future in self.busy:
            future.result()
        self.busy = []


@dataclass
class _Piece:
    """Elements of a step's tensor; the first `shared` of them are the base's too."""

    step: Step
    start: int
    numel: int
    shared: int
    slot: _Slot
    ours: torch.Tensor
    theirs: torch.Tensor
    reads: list[Future[None]] = field(default_factory=list)

    @property
    def is_last(self) -> bool:
        return self.start + self.numel == self.step.info.numel


class Streamer:
    """Threads and memory for making shards. A context manager.

    Args:
        plan: how base and other fit together.
        base: the base language model.
        other: the delta, or the target.
        hashed: which of `STREAMS` are hashed on the way.
    """

    def __init__(
        self, plan: Plan, base: Checkpoint, other: Checkpoint, hashed: Collection[str] = STREAMS
    ) -> None:
        self._steps = {step.name: step for step in plan.steps}
        self._base = base
        self._other = other
        self._hashed = hashed
        self._stack = ExitStack()
        self._slots: deque[_Slot] = deque()
        self._digests: dict[str, Any] = {}

    def __enter__(self) -> Streamer:
        """Starts the threads."""
        self._stack.enter_context(one_thread())
        self._read_base = self._thread("read-base")
        self._read_other = self._thread("read-other")
        self._write = self._thread("write")
        self._hashers = {name: self._thread(f"hash-{name}") for name in self._hashed}
        self._slots.extend(_Slot() for _ in range(_PIECES_IN_FLIGHT))
        return self

    def _thread(self, name: str) -> ThreadPoolExecutor:
        """A single thread, so that what is handed to it is done in order."""
        return self._stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix=name))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the threads and gives the memory back."""
        self._stack.close()
        self._slots.clear()

    def make(self, path: Path, shard: Shard, arithmetic: Arithmetic, progress: Progress) -> Hashes:
        """Writes one shard of the result and returns the hashes of what went through.

        Args:
            path: the file to write.
            shard: the tensors that go into it.
            arithmetic: what to do.
            progress: advanced by the bytes written; its unit is MiB.

        Raises:
            WeightsError: an input is broken or the disk is full.
        """
        hashes = Hashes()
        infos = {name: self._steps[name].info for name in shard.tensors}
        with SafetensorsWriter(path, infos) as writer:
            for piece in self._read_ahead(writer.order):
                if piece.step.rotary:
                    frequencies = arithmetic.rotary(piece.step)
                    piece.slot.busy.append(self._write.submit(writer.append, frequencies))
                    continue
                result = self._result(piece, arithmetic)
                piece.slot.busy.append(self._write.submit(writer.append, result))
                self._hash(piece, result, hashes)
                progress.advance_bytes(result.nbytes)
            # Before the file is closed, and before the hashes are looked at.
            for slot in self._slots:
                slot.wait()
        return hashes

    def _read_ahead(self, names: Sequence[str]) -> Iterator[_Piece]:
        """The pieces of some tensors in order, while the next ones are being read."""
        ahead: deque[_Piece] = deque()
        for piece in self._pieces(names):
            ahead.append(piece)
            if len(ahead) > _PIECES_READ_AHEAD:
                yield ahead.popleft()
        yield from ahead

    def _pieces(self, names: Sequence[str]) -> Iterator[_Piece]:
        for step in (self._steps[name] for name in names):
            their_dtype = self._base.info(step.base).dtype if step.base else step.info.dtype
            elements = _PIECE_BYTES // max(step.info.dtype.itemsize, their_dtype.itemsize)
            # A tensor without elements is a piece, too: its hash is wanted.
            for start in range(0, max(step.info.numel, 1), elements):
                numel = min(elements, step.info.numel - start)
                shared = min(max(step.overlap - start, 0), numel)
                slot = self._slots[0]
                self._slots.rotate(-1)
                slot.wait()
                ours = slot.view("other", numel, step.info.dtype)
                theirs = slot.view("base", shared, their_dtype)
                piece = _Piece(step, start, numel, shared, slot, ours, theirs)
                if not step.rotary:
                    self._start_reading(piece)
                yield piece
                if step.rotary:
                    break

    def _start_reading(self, piece: _Piece) -> None:
        step, start = piece.step, piece.start
        reading = [self._read_other.submit(self._other.read_into, step.name, start, piece.ours)]
        if step.base is not None and piece.shared:
            reading.append(
                self._read_base.submit(self._base.read_into, step.base, start, piece.theirs)
            )
        piece.reads = reading

    def _result(self, piece: _Piece, arithmetic: Arithmetic) -> torch.Tensor:
        for reading in piece.reads:
            reading.result()
        if not piece.shared:
            return piece.ours
        n = piece.shared
        out = piece.slot.view("result", piece.numel, piece.step.info.dtype)
        arithmetic.combine(piece.step, piece.start, piece.theirs, piece.ours[:n], out[:n])
        out[n:] = piece.ours[n:]
        return out

    def _hash(self, piece: _Piece, result: torch.Tensor, hashes: Hashes) -> None:
        """Hands a piece to the threads that hash; what is not hashed here is not in `hashes`."""
        if piece.start == 0:
            self._digests = {name: hashlib.sha256() for name in self._hashed}
        step = piece.step
        names = {"base": step.base, "other": step.name, "result": step.name}
        parts = {"base": piece.theirs, "other": piece.ours, "result": result}
        for stream, hasher in self._hashers.items():
            digest, name = self._digests[stream], names[stream]
            if name is None:
                continue
            piece.slot.busy.append(hasher.submit(digest.update, bytes_of(parts[stream])))
            if piece.is_last:
                table: dict[str, str] = getattr(hashes, stream)
                piece.slot.busy.append(hasher.submit(_note_digest, table, name, digest))


def _note_digest(table: dict[str, str], name: str, digest: Any) -> None:
    table[name] = digest.hexdigest()


def refuse_full_disk(folder: Path, needed: int) -> None:
    """Refuses before a byte is written what cannot fit.

    Args:
        folder: the folder that will be written in (or its nearest parent that exists).
        needed: bytes to come.

    Raises:
        WeightsError: the disk has less room than that.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WeightsError(
            f"needs {needed / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are free",
            where=str(folder),
            hint="make room, or write to another disk",
        )


def source_facts(checkpoint: Checkpoint) -> Mapping[str, object]:
    """What tells one state of a checkpoint's files from another without reading them."""
    files = {}
    for file in checkpoint.files:
        stat = file.path.stat()
        files[file.path.name] = [stat.st_size, stat.st_mtime_ns]
    return {"path": str(checkpoint.path.resolve()), "files": files}

"""One file of a target or delta made from two checkpoints, piece by piece.

Memory holds a few pieces of a few megabytes, whatever the size of the model. Two threads read
ahead, the caller's own adds, one writes and up to three hash what has passed: the work is bound by
SHA-256 and by the disk, and all of it runs outside Python's lock. Pieces are small enough to stay
in the processor's cache from the read to the write, and their memory is used again and again,
because the first touch of fresh memory costs as much as the sum itself.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from chatbind_cli.checkpoints.checkpoint import Checkpoint
from chatbind_cli.checkpoints.delta import Step
from chatbind_cli.checkpoints.manifest import hash_tensor, is_rotary
from chatbind_cli.checkpoints.writer import SafetensorsWriter, bytes_of
from chatbind_cli.console import Progress

STREAMS = ("base", "other", "result")

# Of each stream, tensor -> SHA-256 of its data.
Hashes = dict[str, dict[str, str]]
# `combine(step, start, theirs, ours, out)` puts the result for a 1-D piece in `out`: `start` is its
# place in the tensor, `theirs` the base's elements and `ours` the delta's (or target's); `out` has
# the dtype and length of `ours`.
Combine = Callable[[Step, int, torch.Tensor, torch.Tensor, torch.Tensor], None]

_PIECE_BYTES = 2 << 20
_PIECES_READ_AHEAD = 4
_PIECES_IN_FLIGHT = 12


def stream_file(
    path: Path,
    steps: Iterable[Step],
    base: Checkpoint,
    other: Checkpoint,
    combine: Combine,
    *,
    hashed: Collection[str] = STREAMS,
    progress: Progress,
) -> Hashes:
    """Writes one safetensors file and returns the hashes of what went through.

    Args:
        path: the file to write.
        steps: what becomes of each of its tensors.
        base: the base language model.
        other: the delta, or the target.
        combine: what is done where base and other both have elements.
        hashed: which of `STREAMS` are hashed on the way; rotary buffers are in none.
        progress: advanced by the bytes written; its unit is MiB.

    Raises:
        WeightsError: an input is broken or the disk is full.
    """
    by_name = {step.name: step for step in steps}
    infos = {name: step.info for name, step in by_name.items()}
    digests: dict[str, dict[str, Any]] = {stream: {} for stream in hashed}
    # The threads end before the file is closed.
    with _one_thread(), SafetensorsWriter(path, infos) as writer, _Pipeline() as pipeline:
        for piece in pipeline.read_ahead([by_name[name] for name in writer.order], base, other):
            result = piece.combined(combine)
            pipeline.hand(piece, "write", writer.append, result)
            for stream in () if piece.step.rotary else hashed:
                tensor = piece.step.base if stream == "base" else piece.step.name
                if tensor is not None:
                    if piece.start == 0:
                        digests[stream][tensor] = hashlib.sha256()
                    part = result if stream == "result" else piece.parts[stream]
                    update = digests[stream][tensor].update
                    pipeline.hand(piece, f"hash {stream}", update, bytes_of(part))
            progress.advance_bytes(result.nbytes)
        pipeline.finish()
    return {
        stream: {name: digest.hexdigest() for name, digest in table.items()}
        for stream, table in digests.items()
    }


def merged(tables: Iterable[Hashes]) -> Hashes:
    """The hashes of several files as those of all."""
    every: Hashes = {stream: {} for stream in STREAMS}
    for hashes in tables:
        for stream, table in hashes.items():
            every[stream].update(table)
    return every


def hash_the_rest(checkpoint: Checkpoint, hashes: dict[str, str]) -> None:
    """Adds the hashes of what a base has in vain: it counts as part of it all the same."""
    for name in checkpoint.tensors:
        if name not in hashes and not is_rotary(name):
            hashes[name] = hash_tensor(checkpoint, name)


class _Piece:
    """Memory for some elements of a step's tensor, and what threads have still to do with them.

    Attributes:
        step: the tensor's step.
        start: place of the first element in the tensor.
        parts: `base` and `other`: their elements; the base has the first ones of them, or none.
    """

    def __init__(self) -> None:
        self._memory = {name: torch.empty(_PIECE_BYTES, dtype=torch.uint8) for name in STREAMS}
        self.pending: list[Future[Any]] = []

    def begin(self, step: Step, start: int, numel: int, base_dtype: torch.dtype) -> None:
        """Makes room for other elements."""
        self.step, self.start = step, start
        shared = min(max(step.overlap - start, 0), numel)
        self.parts = {
            "base": self._view("base", shared, base_dtype),
            "other": self._view("other", numel, step.info.dtype),
        }

    def combined(self, combine: Combine) -> torch.Tensor:
        """The result; what the base does not have is the other's alone."""
        ours = self.parts["other"]
        shared = self.parts["base"].numel()
        if not shared:
            return ours
        out = self._view("result", ours.numel(), ours.dtype)
        combine(self.step, self.start, self.parts["base"], ours[:shared], out[:shared])
        out[shared:] = ours[shared:]
        return out

    def wait(self) -> None:
        """Returns when the threads are done with it, or raises what one of them met."""
        for future in self.pending:
            future.result()
        self.pending = []

    def _view(self, stream: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return self._memory[stream][: numel * dtype.itemsize].view(dtype)


class _Pipeline:
    """The pieces, and a thread for each kind of work on them. A context manager."""

    def __enter__(self) -> _Pipeline:
        self._stack = ExitStack()
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._pieces = deque(_Piece() for _ in range(_PIECES_IN_FLIGHT))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def hand(self, piece: _Piece, work: str, function: Callable[..., Any], *args: Any) -> None:
        """Gives a piece to a thread, which does one after another, in order."""
        if work not in self._threads:
            self._threads[work] = self._stack.enter_context(ThreadPoolExecutor(1, work))
        piece.pending.append(self._threads[work].submit(function, *args))

    def read_ahead(
        self, steps: Iterable[Step], base: Checkpoint, other: Checkpoint
    ) -> Iterator[_Piece]:
        """The pieces of some tensors in order, while the next ones are being read."""
        ahead: deque[_Piece] = deque()
        for step in steps:
            base_dtype = base.info(step.base).dtype if step.base else step.info.dtype
            elements = _PIECE_BYTES // max(step.info.dtype.itemsize, base_dtype.itemsize)
            # A tensor without elements is a piece, too: its hash is wanted.
            for start in range(0, max(step.info.numel, 1), elements):
                piece = self._pieces[0]
                self._pieces.rotate(-1)
                piece.wait()
                numel = min(elements, step.info.numel - start)
                piece.begin(step, start, numel, base_dtype)
                own = piece.parts["other"]
                self.hand(piece, "read other", other.read_into, step.name, start, own)
                if piece.parts["base"].numel():
                    theirs = piece.parts["base"]
                    self.hand(piece, "read base", base.read_into, step.base, start, theirs)
                ahead.append(piece)
                if len(ahead) > _PIECES_READ_AHEAD:
                    yield self._read(ahead.popleft())
        while ahead:
            yield self._read(ahead.popleft())

    def _read(self, piece: _Piece) -> _Piece:
        piece.wait()
        return piece

    def finish(self) -> None:
        """Returns when all that was handed on is done."""
        for piece in self._pieces:
            piece.wait()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps torch from spreading each small sum over all cores.

    Its threads spin while they wait for the next sum, and take the cores from those that read,
    hash and write.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

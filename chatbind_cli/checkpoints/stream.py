"""One file of a target or delta made from two checkpoints, piece by piece.

While some pieces are read, one is summed, and those before it are hashed and written: the work is
bound by SHA-256 and by the disk, and all of it runs outside Python's lock. Memory holds a few
pieces, whatever the size of the model; it is used again and again, because the first touch of fresh
memory costs as much as the sum itself.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from chatbind_cli.checkpoints.checkpoint import Checkpoint
from chatbind_cli.checkpoints.delta import Step
from chatbind_cli.checkpoints.safetensors_file import SafetensorsWriter, bytes_of
from chatbind_cli.console import Progress
from chatbind_cli.device import one_thread

STREAMS = ("base", "other", "result")

# Of each stream, tensor -> SHA-256 of its data.
Hashes = dict[str, dict[str, str]]
# `combine(step, start, theirs, ours, out)` puts the result for a 1-D piece in `out`: `start` is its
# place in the tensor, `theirs` the base's elements and `ours` the delta's (or target's); all three
# are as long as the base has elements there, `ours` and `out` of the same dtype.
Combine = Callable[[Step, int, torch.Tensor, torch.Tensor, torch.Tensor], None]

_PIECE_BYTES = 2 << 20
_PIECES_IN_FLIGHT = 12
_PIECES_READ_AHEAD = 4  # one would have the disk wait for the processor


@dataclass
class _Piece:
    """Some elements of a step's tensor; the base has the first ones of them, or none."""

    step: Step
    start: int
    base: torch.Tensor
    other: torch.Tensor
    result: torch.Tensor

    def sum_up(self, combine: Combine) -> None:
        """Makes the result; what the base does not have is the other's alone."""
        shared = self.base.numel()
        combine(self.step, self.start, self.base, self.other[:shared], self.result[:shared])
        self.result[shared:] = self.other[shared:]


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

    `combine` does what is done where base and other (the delta, or the target) both have elements.
    Those of `STREAMS` that are `hashed` are hashed on the way; rotary buffers are in none.

    Raises:
        WeightsError: an input is broken or the disk is full.
    """
    by_name = {step.name: step for step in steps}
    digests: dict[str, dict[str, Any]] = {stream: {} for stream in hashed}
    writer = SafetensorsWriter(path, {name: step.info for name, step in by_name.items()})
    pieces = _pieces([by_name[name] for name in writer.order], base)
    # Threads of torch would spin while they wait for the next sum, and take the cores from ours.
    # These end before the file is closed; each does one piece after another.
    with one_thread(), writer, ExitStack() as stack:
        threads = {
            work: stack.enter_context(ThreadPoolExecutor(1))
            for work in ("read base", "read other", "write", *hashed)
        }
        ahead: deque[tuple[_Piece, list[Future[Any]]]] = deque()
        behind: deque[list[Future[Any]]] = deque()

        def go_on() -> None:
            piece, reading = ahead.popleft()
            _wait(reading)
            piece.sum_up(combine)
            progress.advance_bytes(piece.result.nbytes)
            writing = threads["write"].submit(writer.append, piece.result)
            behind.append([writing, *_hash(piece, digests, threads)])

        for piece in pieces:
            if len(ahead) + len(behind) == _PIECES_IN_FLIGHT:  # whose memory the piece has
                _wait(behind.popleft())
            ahead.append((piece, [*_read(piece, base, other, threads)]))
            if len(ahead) > _PIECES_READ_AHEAD:
                go_on()
        while ahead:
            go_on()
        _wait(chain.from_iterable(behind))
    return {
        stream: {name: digest.hexdigest() for name, digest in table.items()}
        for stream, table in digests.items()
    }


def _read(
    piece: _Piece, base: Checkpoint, other: Checkpoint, threads: dict[str, ThreadPoolExecutor]
) -> Iterator[Future[Any]]:
    step, start = piece.step, piece.start
    yield threads["read other"].submit(other.read_into, step.name, start, piece.other)
    if step.base is not None and piece.base.numel():
        yield threads["read base"].submit(base.read_into, step.base, start, piece.base)


def _hash(
    piece: _Piece, digests: dict[str, dict[str, Any]], threads: dict[str, ThreadPoolExecutor]
) -> Iterator[Future[Any]]:
    for stream, table in digests.items():
        tensor = piece.step.base if stream == "base" else piece.step.name
        if tensor is not None and not piece.step.rotary:
            if piece.start == 0:
                table[tensor] = hashlib.sha256()
            data = bytes_of(getattr(piece, stream))
            yield threads[stream].submit(table[tensor].update, data)


def _wait(work: Iterable[Future[Any]]) -> None:
    for future in work:
        future.result()


def _pieces(steps: Iterable[Step], base: Checkpoint) -> Iterator[_Piece]:
    """The pieces of some tensors in order, without their data, over memory of a few of them."""
    memory = [
        [torch.empty(_PIECE_BYTES, dtype=torch.uint8) for _ in STREAMS]
        for _ in range(_PIECES_IN_FLIGHT)
    ]
    for step in steps:
        own_dtype = step.info.dtype
        base_dtype = base.info(step.base).dtype if step.base else own_dtype
        elements = _PIECE_BYTES // max(own_dtype.itemsize, base_dtype.itemsize)
        # A tensor without elements is a piece, too: its hash is wanted.
        for start in range(0, max(step.info.numel, 1), elements):
            numel = min(elements, step.info.numel - start)
            shared = min(max(step.overlap - start, 0), numel)
            theirs, ours, result = memory[0]
            memory.append(memory.pop(0))
            yield _Piece(
                step,
                start,
                theirs[: shared * base_dtype.itemsize].view(base_dtype),
                ours[: numel * own_dtype.itemsize].view(own_dtype),
                result[: numel * own_dtype.itemsize].view(own_dtype),
            )


def merged(tables: Iterable[Hashes]) -> Hashes:
    """The hashes of several files as those of all."""
    every: Hashes = {stream: {} for stream in STREAMS}
    for hashes in tables:
        for stream, table in hashes.items():
            every[stream].update(table)
    return every

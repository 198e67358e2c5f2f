"""Media items -> embeddings, in order: decoding ahead in threads, encoding in batches.

With several processes, each encodes its share and the first one gets all results. What becomes
of them (records, a store, label probabilities) is not known here.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist

from chatbind_cli import launch
from chatbind_cli.data.media_items import MediaItem
from chatbind_cli.errors import ChatBindError, MediaError, contained
from chatbind_cli.imagebind.encoder import Encoder
from chatbind_cli.imagebind.preprocess import Media, load_media
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.sniff import sniff
from chatbind_cli.media.source import shown

_PATIENCE_S = 0.2  # until a thread that waits for room looks whether it is still wanted

GPU_FAILED = (torch.OutOfMemoryError, torch.AcceleratorError)
"""What no single medium or question is to blame for, and no other would survive."""

NO_EMBEDDING = "the encoder made numbers of it that are not finite, or all zero"

Recall = Callable[[str, str], torch.Tensor | None]
"""From a modality and the SHA-256 of a content to its embedding, if there is one already."""


@dataclass(frozen=True, eq=False)
class _Known:
    """A medium with its embedding."""

    modality: str
    sha256: str
    embedding: torch.Tensor


_Loaded = Media | _Known | ChatBindError


@dataclass(frozen=True)
class _End:
    """The end of the list, and why it ended early, if it did."""

    error: ChatBindError | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Encoded:
    """What became of an item: an embedding, or the reason why there is none.

    Attributes:
        item: what was asked for.
        modality: what it is; None where that could not be told.
        sha256: hash of its content, hexadecimal; None with an error.
        embedding: as published, not normalised, float32 [dim]; None with an error.
        error: the reason.
    """

    item: MediaItem
    modality: str | None
    sha256: str | None = None
    embedding: torch.Tensor | None = None
    error: ChatBindError | None = None


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """How the work is done.

    Attributes:
        media: how files become tensors.
        workers: threads that decode ahead; 0 decodes between the encoder's batches.
        batch_size: media that go to the encoder together.
        recall: asked before a medium is decoded, from several threads at once.
    """

    media: MediaOptions
    workers: int = 2
    batch_size: int = 1
    recall: Recall | None = None


def encode_items(
    items: Iterable[MediaItem], encoder: Encoder, options: EncodingOptions
) -> Generator[Encoded, None, None]:
    """Yields what became of each item, in order; a medium that cannot be used is a result too.

    Raises:
        ChatBindError: the encoder itself cannot be used, or the list of items cannot be read.
    """
    for batch in _batches(items, encoder, options):
        media = [loaded for _, loaded in batch if isinstance(loaded, Media)]
        rows = iter(embed_each(encoder, media))
        for item, loaded in batch:
            if isinstance(loaded, Media):
                yield _encoded(item, loaded.modality, loaded.source.sha256, next(rows))
            elif isinstance(loaded, _Known):
                yield _encoded(item, loaded.modality, loaded.sha256, loaded.embedding)
            else:
                yield Encoded(item=item, modality=item.modality, error=loaded)


def _encoded(
    item: MediaItem, modality: str, sha256: str, embedding: torch.Tensor | ChatBindError
) -> Encoded:
    if isinstance(embedding, ChatBindError):
        return Encoded(item=item, modality=modality, error=embedding)
    return Encoded(item=item, modality=modality, sha256=sha256, embedding=embedding)


def embed_each(encoder: Encoder, media: Sequence[Media]) -> list[torch.Tensor | ChatBindError]:
    """Returns the embedding of each medium, not normalised, or why there is none.

    One that the encoder fails on takes no other of its batch with it.

    Raises:
        ChatBindError: the encoder itself cannot be used.
        RuntimeError: the GPU is out of memory or order.
    """
    try:
        rows = encoder.embed(media, normalize=False)
    except (ChatBindError, *GPU_FAILED):
        raise
    except Exception as error:
        if len(media) == 1:
            return [contained(error, where=media[0].source.name)]
        return [result for medium in media for result in embed_each(encoder, [medium])]
    return [
        row if is_embedding(row) else MediaError(NO_EMBEDDING, where=medium.source.name)
        for row, medium in zip(rows, media, strict=True)
    ]


def is_embedding(row: torch.Tensor) -> bool:
    """Whether a row means something: its numbers are finite, and not all of them zero."""
    return bool(row.isfinite().all() and row.any())


def encode_share(
    items: Sequence[MediaItem] | None, encoder: Encoder, options: EncodingOptions
) -> Generator[Encoded, None, None]:
    """Encodes this process's share of the items; the first process yields everybody's, in order.

    Args:
        items: what is to be done, on the first process; None on the others.
        encoder: on this process's device.
        options: how the work is done.
    """
    dist.init_process_group("gloo")
    try:
        sent: list[Sequence[MediaItem] | None] = [items]
        dist.broadcast_object_list(sent, src=0)
        todo = sent[0] or ()
        rank, n = launch.rank(), launch.world_size()
        size = options.batch_size
        blocks = [todo[start : start + size] for start in range(0, len(todo), size)]
        blocks += [()] * (-len(blocks) % n)  # all take part in every round
        own = blocks[rank::n]
        results = encode_items((item for block in own for item in block), encoder, options)
        for block in own:
            done = list(islice(results, len(block)))
            gathered: list[list[Encoded]] | None = [[] for _ in range(n)] if rank == 0 else None
            dist.gather_object(done, gathered, dst=0)
            for part in gathered or ():
                yield from part
    finally:
        dist.destroy_process_group()


def _batches(
    items: Iterable[MediaItem], encoder: Encoder, options: EncodingOptions
) -> Iterator[list[tuple[MediaItem, _Loaded]]]:
    known = frozenset(encoder.modalities)
    if options.workers:
        yield from _LoadAhead(items, known, options).batches()
        return
    remaining = iter(items)
    while batch := list(islice(remaining, options.batch_size)):
        yield [(item, _load(item, known, options)) for item in batch]


class _LoadAhead:
    """Reads the list and decodes its media in threads, a bounded number of media ahead.

    The list has a thread of its own, because it may be a pipe that is slow to say more: what is
    decoded goes on without waiting for the next line. That thread holds items and nothing else.
    Threads are waited for only in the one that works through the batches: Python may end
    `batches` in any other, too.

    Args:
        items: what to decode.
        known: the modalities that the encoder has towers for.
        options: how.
    """

    def __init__(
        self, items: Iterable[MediaItem], known: frozenset[str], options: EncodingOptions
    ) -> None:
        self._items = items
        self._known = known
        self._options = options
        self._ahead = options.workers + options.batch_size
        self._arrived: queue.Queue[MediaItem | _End] = queue.Queue(self._ahead)
        self._stopped = False

    def batches(self) -> Iterator[list[tuple[MediaItem, _Loaded]]]:
        """Yields what is ready, in order, up to the size of a batch at a time."""
        # a daemon: it may sit in a read of a pipe that never says more when the work is given up
        reader = threading.Thread(target=self._read, name="list", daemon=True)
        reader.start()
        mine = threading.current_thread()
        pool = ThreadPoolExecutor(self._options.workers, thread_name_prefix="decode")
        waiting: deque[tuple[MediaItem, Future[_Loaded]]] = deque()
        end: _End | None = None
        try:
            while waiting or end is None:
                while end is None and (not waiting or self._may_take(len(waiting))):
                    entry = self._arrived.get()
                    if isinstance(entry, _End):
                        end = entry
                    else:
                        job = pool.submit(_load, entry, self._known, self._options)
                        waiting.append((entry, job))
                size = min(len(waiting), self._options.batch_size)
                taken = [waiting.popleft() for _ in range(size)]
                yield [(item, job.result()) for item, job in taken]
            if end.error is not None:
                raise end.error
        finally:
            self._stopped = True
            own = threading.current_thread() is mine
            pool.shutdown(wait=own, cancel_futures=True)
            if own:
                reader.join(2 * _PATIENCE_S)

    def _may_take(self, n_waiting: int) -> bool:
        return n_waiting < self._ahead and not self._arrived.empty()

    def _read(self) -> None:
        end = _End()
        try:
            for item in self._items:
                if not self._put(item):
                    return
        except OSError as error:
            end = _End(ChatBindError(f"the list cannot be read: {error.strerror or error}"))
        except Exception as error:
            end = _End(contained(error, where="the list"))
        self._put(end)

    def _put(self, entry: MediaItem | _End) -> bool:
        """Waits for room; returns False where the work was given up meanwhile."""
        while not self._stopped:
            with suppress(queue.Full):
                self._arrived.put(entry, timeout=_PATIENCE_S)
                return True
        return False


def _load(item: MediaItem, known: frozenset[str], options: EncodingOptions) -> _Loaded:
    try:
        source = item.open()
        modality = item.modality or sniff(source)
        if modality not in known:
            return MediaError(f"the encoder has no tower for {modality}", where=source.name)
        sha256 = source.sha256  # hashed here, in the thread
        embedding = options.recall(modality, sha256) if options.recall else None
        if embedding is not None:
            return _Known(modality, sha256, embedding)
        return load_media(source, modality, options.media)
    except Exception as error:
        return contained(error, where=shown(item.path))

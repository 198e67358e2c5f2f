"""Media items -> embeddings, in order: decoding ahead in threads, encoding in batches.

With several processes, each encodes its share and the first one gets all results. What becomes
of them (records, a store, label probabilities) is not known here.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist

from chatbind_cli import launch
from chatbind_cli.data.media_items import MediaItem
from chatbind_cli.errors import ChatBindError, MediaError
from chatbind_cli.imagebind.encoder import Encoder
from chatbind_cli.media.load import Media, load_media
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.sniff import sniff

Recall = Callable[[str, str], torch.Tensor | None]
"""From a modality and the SHA-256 of a content to its embedding, if there is one already."""


@dataclass(frozen=True, eq=False)
class _Recalled:
    """A medium that need not be decoded."""

    modality: str
    sha256: str
    embedding: torch.Tensor


_Loaded = Media | _Recalled | ChatBindError
_Waiting = tuple[MediaItem, Future[_Loaded]]


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
) -> Iterator[Encoded]:
    """Yields what became of each item, in order; a medium that cannot be read is a result too.

    Raises:
        ChatBindError: the encoder itself cannot be used, or the list of items cannot be read.
    """
    for batch in _batches(items, encoder, options):
        media = [result for _, result in batch if isinstance(result, Media)]
        rows = iter(encoder.embed(media, normalize=False))
        for item, result in batch:
            if isinstance(result, Media):
                yield Encoded(
                    item=item,
                    modality=result.modality,
                    sha256=result.source.sha256,
                    embedding=next(rows),
                )
            elif isinstance(result, _Recalled):
                yield Encoded(
                    item=item,
                    modality=result.modality,
                    sha256=result.sha256,
                    embedding=result.embedding,
                )
            else:
                yield Encoded(item=item, modality=item.modality, error=result)


def encode_share(
    items: Sequence[MediaItem] | None, encoder: Encoder, options: EncodingOptions
) -> Iterator[Encoded]:
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
    decoded goes on without waiting for the next line.

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
        self._pool = ThreadPoolExecutor(options.workers, thread_name_prefix="decode")
        self._waiting: queue.Queue[_Waiting | ChatBindError | None] = queue.Queue(
            options.workers + options.batch_size
        )
        self._changing = threading.Lock()
        self._stopped = False
        # a daemon: it may sit in a read of a pipe that never says more when the work is given up
        self._reader = threading.Thread(target=self._read, name="list", daemon=True)

    def batches(self) -> Iterator[list[tuple[MediaItem, _Loaded]]]:
        """Yields what is ready, in order, up to the size of a batch at a time."""
        self._reader.start()
        end: ChatBindError | None = None
        ended = False
        try:
            while not ended:
                waiting = [self._waiting.get()]
                while len(waiting) < self._options.batch_size and not self._waiting.empty():
                    waiting.append(self._waiting.get())
                batch: list[tuple[MediaItem, _Loaded]] = []
                for entry in waiting:
                    if isinstance(entry, tuple):
                        batch.append((entry[0], entry[1].result()))
                    else:
                        ended, end = True, entry
                yield batch
            if end is not None:
                raise end
        finally:
            self._stop()

    def _read(self) -> None:
        end: ChatBindError | None = ChatBindError("the reading of the list broke off")
        try:
            for item in self._items:
                with self._changing:
                    if self._stopped:
                        return
                    future = self._pool.submit(_load, item, self._known, self._options)
                self._waiting.put((item, future))
            end = None
        except ChatBindError as error:
            end = error
        except OSError as error:
            end = ChatBindError(f"the list cannot be read: {error.strerror or error}")
        finally:
            self._waiting.put(end)

    def _stop(self) -> None:
        with self._changing:
            self._stopped = True
        while not self._waiting.empty():  # a reader that waits for room goes on and sees the end
            self._waiting.get()
        self._pool.shutdown(cancel_futures=True)


def _load(item: MediaItem, known: frozenset[str], options: EncodingOptions) -> _Loaded:
    try:
        source = item.open()
        modality = item.modality or sniff(source)
        if modality not in known:
            return MediaError(f"the encoder has no tower for {modality}", where=source.name)
        sha256 = source.sha256  # hashed here, in the thread
        embedding = options.recall(modality, sha256) if options.recall else None
        if embedding is not None:
            return _Recalled(modality, sha256, embedding)
        media = load_media(source, modality, options.media)
    except ChatBindError as error:
        return error
    return media

"""Media items -> embeddings, in order: decoding ahead in threads, encoding in batches.

With several processes, each encodes its share and the first one gets all results. What becomes
of them (records, a store, label probabilities) is not known here.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.distributed as dist

from chatbind_cli import worker
from chatbind_cli.data.media_items import MediaItem
from chatbind_cli.encoders.imagebind.encoder import Encoder
from chatbind_cli.encoders.imagebind.preprocess import Decoded, load_media
from chatbind_cli.errors import ChatBindError, MediaError, contained
from chatbind_cli.jsonl import legible
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.sniff import sniff
from chatbind_cli.media.source import MediaSource, shown

GPU_FAILED = (torch.OutOfMemoryError, torch.AcceleratorError)
"""What no single medium or question is to blame for, and no other would survive."""

NO_EMBEDDING = "the encoder made numbers of it that are not finite, or all zero"

Recall = Callable[[str, str], torch.Tensor | None]
"""From a modality and the SHA-256 of a content to its embedding, if there is one already. Asked
before a medium is decoded, from several threads at once."""


_Loaded = Decoded | Medium | ChatBindError
"""What the encoder takes, a medium with its embedding, or why there is none."""


@dataclass(frozen=True)
class Encoded:
    """What became of an item.

    Args:
        item: what was asked for.
        medium: with what was found of it: its modality, hash and embedding (not normalised).
        error: the reason why it has no embedding.
    """

    item: MediaItem
    medium: Medium
    error: ChatBindError | None = None


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """How the work is done.

    Attributes:
        media: how files become tensors.
        workers: threads that decode ahead; 0 decodes between the encoder's batches.
        batch_size: media that go to the encoder together.
    """

    media: MediaOptions
    workers: int = 2
    batch_size: int = 1


def encode_items(
    items: Iterable[MediaItem],
    encoder: Encoder,
    options: EncodingOptions,
    recall: Recall | None = None,
) -> Generator[Encoded, None, None]:
    """Yields what became of each item, in order; a medium that cannot be used is a result too.

    Raises:
        ChatBindError: the encoder itself cannot be used, or the list of items cannot be read.
    """
    known = frozenset(encoder.modalities)

    def load(item: MediaItem) -> _Loaded:
        return decode(item.medium, item.open, known, options.media, recall)

    for batch in _batches(items, load, options):
        rows = iter(embed_each(encoder, [it for _, it in batch if isinstance(it, Decoded)]))
        for item, loaded in batch:
            if isinstance(loaded, Decoded):
                yield _encoded(item, loaded, next(rows))
            elif isinstance(loaded, Medium):
                yield Encoded(item, loaded)
            else:
                yield Encoded(item, item.medium, loaded)


def _encoded(item: MediaItem, media: Decoded, row: torch.Tensor | ChatBindError) -> Encoded:
    medium = replace(item.medium, modality=media.modality, sha256=media.source.sha256)
    if isinstance(row, ChatBindError):
        return Encoded(item, medium, row)
    return Encoded(item, replace(medium, embedding=row))


def decode(
    medium: Medium,
    open_medium: Callable[[], MediaSource],
    known: Collection[str],
    options: MediaOptions,
    recall: Recall | None = None,
) -> _Loaded:
    """Decodes a medium, unless its embedding is known already or it cannot be used.

    Args:
        medium: what it is called.
        open_medium: finds its bytes.
        known: the modalities that the encoder has towers for.
        options: how it becomes a tensor.
        recall: see `Recall`.
    """
    try:
        source = open_medium()
        modality = medium.modality or sniff(source)
        if modality not in known:
            return MediaError(f"the encoder has no tower for {modality}", where=source.name)
        sha256 = source.sha256  # hashed here, in the thread
        embedding = recall(modality, sha256) if recall else None
        if embedding is not None:
            return replace(medium, modality=modality, sha256=sha256, embedding=embedding)
        return load_media(source, modality, options)
    except Exception as error:
        return contained(error, where=shown(legible(medium.name)))


def embed_each(encoder: Encoder, media: Sequence[Decoded]) -> list[torch.Tensor | ChatBindError]:
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
    items: Sequence[MediaItem] | None,
    encoder: Encoder,
    options: EncodingOptions,
    recall: Recall | None = None,
) -> Generator[Encoded, None, None]:
    """Encodes this process's share of the items; the first process yields everybody's, in order.

    Args:
        items: what is to be done, on the first process; None on the others.
        encoder: on this process's device.
        options: how the work is done.
        recall: what this process knows already.
    """
    dist.init_process_group("gloo")
    try:
        sent: list[Sequence[MediaItem] | None] = [items]
        dist.broadcast_object_list(sent, src=0)
        todo = sent[0] or ()
        rank, n = worker.rank(), worker.world_size()
        size = options.batch_size
        blocks = [todo[start : start + size] for start in range(0, len(todo), size)]
        blocks += [()] * (-len(blocks) % n)  # all take part in every round
        own = blocks[rank::n]
        results = encode_items((item for block in own for item in block), encoder, options, recall)
        for block in own:
            done = list(islice(results, len(block)))
            gathered: list[list[Encoded]] | None = [[] for _ in range(n)] if rank == 0 else None
            dist.gather_object(done, gathered, dst=0)
            for part in gathered or ():
                yield from part
    finally:
        dist.destroy_process_group()


def _batches(
    items: Iterable[MediaItem],
    load: Callable[[MediaItem], _Loaded],
    options: EncodingOptions,
) -> Iterator[list[tuple[MediaItem, _Loaded]]]:
    """Yields what is ready, in order, up to the size of a batch at a time.

    The list has a thread of its own, because it may be a pipe that is slow to say more: what is
    decoded goes on without waiting for the next line.
    """
    if not options.workers:
        remaining = iter(items)
        while batch := list(islice(remaining, options.batch_size)):
            yield [(item, load(item)) for item in batch]
        return
    ahead = options.workers + options.batch_size  # a bounded number of media
    arrived: queue.Queue[MediaItem | ChatBindError | None] = queue.Queue(ahead)
    given_up = threading.Event()
    # a daemon: it may sit in a read of a pipe that never says more when the work is given up
    reading = threading.Thread(target=_read, args=(items, arrived, given_up), daemon=True)
    reading.start()
    pool = ThreadPoolExecutor(options.workers, thread_name_prefix="decode")
    waiting: deque[tuple[MediaItem, Future[_Loaded]]] = deque()
    more, failure = True, None
    try:
        while waiting or more:
            while more and (not waiting or (len(waiting) < ahead and not arrived.empty())):
                item = arrived.get()
                if isinstance(item, MediaItem):
                    waiting.append((item, pool.submit(load, item)))
                else:
                    more, failure = False, item
            ready = [waiting.popleft() for _ in range(min(len(waiting), options.batch_size))]
            yield [(item, decoded.result()) for item, decoded in ready]
        if failure is not None:
            raise failure
    finally:
        given_up.set()
        # Python may end this generator in any thread, one of the pool's too: nobody is waited for
        pool.shutdown(wait=False, cancel_futures=True)
        with suppress(queue.Empty):
            while True:  # makes room, so that the list's thread comes to its end
                arrived.get_nowait()


def _read(
    items: Iterable[MediaItem],
    arrived: queue.Queue[MediaItem | ChatBindError | None],
    given_up: threading.Event,
) -> None:
    """Puts the items into a queue; at the end None, or why the list cannot be read on."""
    failure: ChatBindError | None = None
    try:
        for item in items:
            arrived.put(item)
            if given_up.is_set():
                return
    except OSError as error:
        failure = ChatBindError(f"the list cannot be read: {error.strerror or error}")
    except Exception as error:
        failure = contained(error, where="the list")
    arrived.put(failure)

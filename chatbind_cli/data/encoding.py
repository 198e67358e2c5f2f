"""Media items -> embeddings, in order: decoding ahead in threads, encoding in batches.

What becomes of them (records, a store, label probabilities) is not known here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from itertools import islice

import torch

from chatbind_cli.data.decoders import FEW, DecodeIn, Decoders, Loaded, Reading, Recall, decode
from chatbind_cli.data.media_items import MediaItem
from chatbind_cli.encoders.encoder import Decoded, Encoder
from chatbind_cli.errors import ChatBindError, MediaError, contained
from chatbind_cli.inbox import Inbox
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.options import MediaOptions

GPU_FAILED = (torch.OutOfMemoryError, torch.AcceleratorError)
"""What no single medium or question is to blame for, and no other would survive."""

NO_EMBEDDING = "the encoder made numbers of it that are not finite, or all zero"


@dataclass(frozen=True)
class Encoded:
    """What became of an item.

    Args:
        item: what was asked for.
        medium: with what was found of it: modality, hash, embedding (not normalised).
        error: why it has no embedding.
    """

    item: MediaItem
    medium: Medium
    error: ChatBindError | None = None


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """How the work is done.

    Attributes:
        media: how files become tensors.
        workers: threads or processes that decode ahead; 0 decodes between the encoder's batches.
        decode_in: which of the two; `auto`: processes where a GPU encodes, since threads do not
            feed one, but not for a few media.
        batch_size: media that go to the encoder together.
    """

    media: MediaOptions
    workers: int = 2
    decode_in: DecodeIn = "threads"
    batch_size: int = 1


def at_once(encoder: Encoder) -> int:
    """Media that go to an encoder together.

    A GPU gets two batches: one is put together while it works on the other.
    """
    return 1 if encoder.device.type == "cpu" else 2 * encoder.batch_size


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
    with ExitStack() as stack:
        load = _loader(encoder, options, recall, stack)
        yield from _encoded(_batches(items, load, options), encoder)


def _loader(
    encoder: Encoder, options: EncodingOptions, recall: Recall | None, stack: ExitStack
) -> Callable[[MediaItem], Loaded]:
    """What decodes an item, in the place that the options say."""
    reading = Reading(encoder.modalities, encoder.read, options.media)
    automatic = options.decode_in == "auto"
    if options.workers and (
        options.decode_in == "processes" or (automatic and encoder.device.type != "cpu")
    ):
        few = FEW if automatic else 0
        return stack.enter_context(closing(Decoders(reading, recall, few)))

    def load(item: MediaItem) -> Loaded:
        return decode(item.medium, item.open, reading, recall)

    return load


def _encoded(
    batches: Iterable[list[tuple[MediaItem, Loaded]]], encoder: Encoder
) -> Generator[Encoded, None, None]:
    for batch in batches:
        rows = iter(embed_each(encoder, [it for _, it in batch if isinstance(it, Decoded)]))
        for item, loaded in batch:
            if isinstance(loaded, ChatBindError):
                yield Encoded(item, item.medium, loaded)
            elif isinstance(loaded, Medium):
                yield Encoded(item, loaded)
            else:
                row = next(rows)
                found = replace(item.medium, modality=loaded.modality, sha256=loaded.source.sha256)
                if isinstance(row, ChatBindError):
                    yield Encoded(item, found, row)
                else:
                    yield Encoded(item, replace(found, embedding=row))


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


def _batches(
    items: Iterable[MediaItem], load: Callable[[MediaItem], Loaded], options: EncodingOptions
) -> Iterator[list[tuple[MediaItem, Loaded]]]:
    """Yields what is ready, in order, up to the size of a batch at a time.

    The list has a thread of its own, because it may be a pipe that is slow to say more: what is
    decoded goes on without waiting for the next line.
    """
    if not options.workers:
        remaining = iter(items)
        while some := list(islice(remaining, options.batch_size)):
            yield [(item, load(item)) for item in some]
        return
    pool = ThreadPoolExecutor(options.workers, thread_name_prefix="decode")
    # bounds the media that are decoded ahead
    decoding: Inbox[tuple[MediaItem, Future[Loaded]]] = Inbox(options.workers + options.batch_size)

    def read() -> None:
        try:
            for item in items:
                if not decoding.put((item, pool.submit(load, item))):
                    return
            decoding.close()
        except Exception as error:
            decoding.close(error)

    # a daemon: it may sit in a read of a pipe that never says more when the work is given up
    threading.Thread(target=read, daemon=True).start()
    try:
        while (first := decoding.take()) is not None:
            ready = [first]
            with suppress(Exception):  # what the list ended with comes again
                while len(ready) < options.batch_size and (more := decoding.take(wait=False)):
                    ready.append(more)
            yield [(item, future.result()) for item, future in ready]
    finally:
        decoding.leave()
        # Python may end this generator in any thread, one of the pool's too: nobody is waited for
        pool.shutdown(wait=False, cancel_futures=True)

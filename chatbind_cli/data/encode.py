"""One run of `encode`: what is missing is encoded and written, what is there is left alone.

A sink is where results go: record files and standard output, or an embedding store. It knows what
an earlier run has dealt with, and takes what is new.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from chatbind_cli.artifacts import artifact_record, emit_artifact, emit_record
from chatbind_cli.console import Progress, note
from chatbind_cli.data.decoders import Recall
from chatbind_cli.data.encoding import Encoded, EncodingOptions, encode_items
from chatbind_cli.data.lookup import part_name
from chatbind_cli.data.media_items import MediaItem
from chatbind_cli.data.store import EmbeddingStore, clear_store
from chatbind_cli.data.work_queue import Worker, follow, work_queue
from chatbind_cli.encoders.encoder import Encoder
from chatbind_cli.encoders.zero_shot import LabelScorer
from chatbind_cli.errors import ChatBindError, UsageError
from chatbind_cli.files import sha256_text
from chatbind_cli.inbox import Inbox
from chatbind_cli.jsonl import Record, RecordWriter
from chatbind_cli.media.modality import MODALITIES
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.worker_pool import WorkerPool

_LOG_EVERY = 1000  # media, while a store is filled
_SHOWN_NUMBERS = 4
_SHOWN_DIGITS = 12


def encode(
    items: Iterable[MediaItem],
    encoder: Encoder,
    options: EncodingOptions,
    sink: RecordSink | StoreSink,
    *,
    on_error: str,
    total: int | None = None,
    pool: WorkerPool = WorkerPool(),  # noqa: B008 (frozen)
) -> Counter[str]:
    """Encodes what a sink has not; `help_encode` is what the workers of a pool do.

    A medium that cannot be encoded becomes a record, a note, or the end, as `on_error` has it:
    "record", "skip" or "fail". `total` is the number of items, where that is known.

    Returns:
        How many media were `encoded`, were there already (`reused`), and `failed`.

    Raises:
        ChatBindError: the encoder, the list or the output cannot be used, or a medium fails and
            `on_error` is "fail".
    """
    n: Counter[str] = Counter()
    begin = partial(_hand, encoder, options, sink.recall)
    with (
        work_queue(pool, begin, id) as queue,
        closing(queue.results(_missing(items, sink, n), in_order=True)) as results,
        Progress(total, "encoding", "files") as progress,
    ):
        for item, result in results:
            if isinstance(result, ChatBindError):
                result = Encoded(item, item.medium, result)
            if result.error is None:
                sink.write(result)
            elif on_error == "fail":
                raise result.error
            elif on_error == "skip":
                note(f"left out: {result.error}")
            else:
                asked = result.item.output(result.medium.modality)
                sink.write_error({**asked, "error": str(result.error)})
            n["encoded" if result.error is None else "failed"] += 1
            progress.advance()
    reused = f", {n['reused']} were there already" if n["reused"] else ""
    failed = f", {n['failed']} failed" if n["failed"] else ""
    note(f"{n['encoded']} files encoded{reused}{failed}")
    return n


def help_encode(encoder: Encoder, options: EncodingOptions) -> None:
    """What a worker does while its leader is in `encode`."""
    follow(partial(_hand, encoder, options, None), id)


def _hand(
    encoder: Encoder, options: EncodingOptions, recall: Recall | None
) -> Worker[MediaItem, Encoded]:
    def work(inbox: Inbox[MediaItem]) -> Iterator[tuple[MediaItem, Encoded]]:
        # `take` says None where there is no other
        for result in encode_items(iter(inbox.take, None), encoder, options, recall):
            yield result.item, result

    return Worker(work, room=2 * (options.workers + options.batch_size))


def _missing(
    items: Iterable[MediaItem], sink: RecordSink | StoreSink, n: Counter[str]
) -> Iterator[MediaItem]:
    """Yields each item that the sink has not, and that has not come before."""
    if not sink.resumes:
        yield from items
        return
    seen: set[tuple[str, str | None]] = set()
    for item in items:
        key = (item.path, item.modality)
        if item.problem is not None:
            yield item
        elif key not in seen:
            seen.add(key)
            if sink.has(item):
                n["reused"] += 1
            else:
                yield item


class RecordSink:
    """Records in a file that a second run continues, or on standard output.

    Args:
        target: the file, or `-`.
        describe: makes a record's own part of an embedding and its modality.
        made_with: the keys that say how it was made, the same in every record.
        overwrite: start the file anew.
    """

    recall = None  # records say no hash of the content

    def __init__(
        self,
        target: str,
        describe: Callable[[torch.Tensor, str], Record],
        made_with: Record,
        *,
        overwrite: bool = False,
    ) -> None:
        self._describe = describe
        self._made_with = made_with
        self._writer = RecordWriter(
            target,
            key=("path", "modality"),
            overwrite=overwrite,
            expect=made_with,
            in_words=_in_words,
        )
        self.resumes = target != "-"
        self.write_error = self._writer.write
        self.close = self._writer.close
        self._paths = {identity[0] for identity in self._writer.done if isinstance(identity, tuple)}

    def has(self, item: MediaItem) -> bool:
        """Whether an earlier run has it: by path, and by modality where the item says one."""
        if item.modality is None:
            return item.path in self._paths
        return (item.path, item.modality) in self._writer.done

    def write(self, result: Encoded) -> None:
        """Writes the item's record with what was found."""
        assert result.medium.embedding is not None and result.medium.modality is not None
        modality = result.medium.modality
        asked = result.item.output(modality)
        found = self._describe(result.medium.embedding, modality)
        self._writer.write({**asked, **found, **self._made_with})
        self._paths.add(result.item.path)


class StoreSink:
    """An embedding store; errors go to standard output.

    Args:
        store: open for writing.
        options: how media become tensors.
        log_every: media between two lines of the log on standard output; 0 for no log.
    """

    resumes = True
    write_error = staticmethod(emit_record)

    def __init__(self, store: EmbeddingStore, options: MediaOptions, *, log_every: int = 0) -> None:
        self._store = store
        self._options = options
        self._log_every = log_every
        self._n = 0

    def has(self, item: MediaItem) -> bool:
        """Whether an earlier run has it, by name and preprocessing."""
        modalities = MODALITIES if item.modality is None else (item.modality,)
        return any(
            self._store.get(m, name=item.name, fingerprint=self._options.fingerprint(m)) is not None
            for m in modalities
        )

    def recall(self, modality: str, sha256: str) -> torch.Tensor | None:
        """The embedding of the same content under another name, if there is one."""
        return self._store.recall(modality, sha256, self._options.fingerprint(modality))

    def write(self, result: Encoded) -> None:
        """Adds a row, and a line to the log now and then."""
        medium = result.medium
        assert medium.modality is not None
        assert medium.sha256 is not None
        assert medium.embedding is not None
        made = self._options.fingerprint(medium.modality)
        self._store.add(result.item.name, medium.modality, medium.sha256, made, medium.embedding)
        self._n += 1
        if self._log_every and self._n % self._log_every == 0:
            emit_record({"step": self._n, "rows": len(self._store)})


@contextmanager
def filled_store(
    folder: Path,
    encoder: Encoder,
    options: MediaOptions,
    *,
    part: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Iterator[StoreSink]:
    """Opens a store to fill, or one of its parts, and tells of it when it is.

    The parts of a store are what `open_stores` opens together. See `writable_store`.
    """
    place = folder if part is None else folder / part_name(part)
    if overwrite:
        clear_store(place)
    with writable_store(place, encoder, options, dtype=dtype) as store:
        yield StoreSink(store, options, log_every=_LOG_EVERY)
        rows = len(store)
    identity = {"name": encoder.name, "sha256": encoder.sha256}
    emit_artifact(artifact_record("store", folder, made_by="encode", rows=rows, encoder=identity))


def writable_store(
    folder: Path, encoder: Encoder, options: MediaOptions, *, dtype: str | None = None
) -> EmbeddingStore:
    """The store of an encoder's embeddings, open for writing.

    If there is none, a new one, whose numbers are of that dtype (a key of `DTYPES`).
    """
    return EmbeddingStore.open(
        folder,
        "a",
        encoder_sha256=encoder.sha256,
        encoder_name=encoder.name,
        dim=encoder.embedding_dim,
        dtype=dtype,
        encoder_dtype=encoder.dtype_name,
        media_options=options.deciding(),
        encoders=len(encoder.parts),
    )


def embedding_sink(
    target: str, encoder: Encoder, *, normalize: bool, overwrite: bool = False
) -> RecordSink:
    """Records of embeddings; `normalize` scales them to length 1."""

    def describe(embedding: torch.Tensor, modality: str) -> Record:
        if normalize:
            embedding = F.normalize(embedding, dim=-1)
        # the shortest decimals that mean the same float32: half as long as those of a float64
        return {"embedding": [float(str(number)) for number in embedding.numpy()]}

    made_with = {"encoder": encoder_id(encoder), "normalized": normalize}
    return RecordSink(target, describe, made_with, overwrite=overwrite)


def label_sink(
    target: str, encoder: Encoder, labels: Path, *, prompt: str, top_k: int, overwrite: bool = False
) -> RecordSink:
    """Records of the likeliest labels; see `LabelScorer`.

    They say how they were made by the encoder and a hash of the labels and the prompt.
    """
    try:
        lines = labels.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot be read as labels: {error}", where=str(labels)) from error
    texts = [line.strip() for line in lines if line.strip()]
    scorer = LabelScorer(encoder, texts, prompt)

    def describe(embedding: torch.Tensor, modality: str) -> Record:
        return {"labels": scorer.score(embedding, top_k, modality)}

    label_set = sha256_text("\n".join([prompt, *texts]))[:_SHOWN_DIGITS]
    made_with = {"encoder": encoder_id(encoder), "label_set": label_set}
    return RecordSink(target, describe, made_with, overwrite=overwrite)


def _in_words(record: Record) -> str:
    """A record for a person at a terminal: the likeliest labels, or an embedding's beginning."""
    if "error" in record:
        return f"error: {record['error']}"
    if "labels" in record:
        found = [f"{e['probability']:.1%} {e['label']}" for e in record["labels"]]
    else:
        numbers = record["embedding"]
        found = [f"{len(numbers)} numbers"]
        found.append(" ".join(f"{x:.4f}" for x in numbers[:_SHOWN_NUMBERS]) + " ...")
    return f"{record['path']}  {record['modality']}  {', '.join(found)}"


def encoder_id(encoder: Encoder) -> str:
    """What records call an encoder: its name, and the beginning of its hash."""
    return f"{encoder.name}@{encoder.sha256[:_SHOWN_DIGITS]}"

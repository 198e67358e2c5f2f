"""Where the results of `encode` go: record files, embedding stores, a terminal.

A sink knows what an earlier run has dealt with, and takes what is new. Knows nothing of how
embeddings are made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Protocol

import torch
import torch.nn.functional as F

from chatbind_cli.artifacts import emit_record
from chatbind_cli.data.encoding import Encoded
from chatbind_cli.data.media_items import MediaItem
from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.imagebind.encoder import Encoder
from chatbind_cli.imagebind.zero_shot import LabelScorer
from chatbind_cli.jsonl import Record, RecordWriter
from chatbind_cli.media.modality import MODALITIES
from chatbind_cli.media.options import MediaOptions

Describe = Callable[[Encoded], Record]
_SHOWN_NUMBERS = 4
_SHOWN_DIGITS = 12


class Sink(Protocol):
    """Where embeddings go.

    Attributes:
        resumes: whether it goes on after what an earlier run has written.
    """

    resumes: bool

    def has(self, item: MediaItem) -> bool:
        """Whether an earlier run has dealt with this item."""
        ...

    def write(self, result: Encoded) -> None:
        """Takes an embedding."""
        ...

    def write_error(self, record: Record) -> None:
        """Takes a record that says why there is none."""
        ...


class RecordSink:
    """Records in a file that a second run continues, or on standard output.

    Args:
        writer: opened with the key ("path", "modality").
        describe: makes a record's own part of a result.
    """

    def __init__(self, writer: RecordWriter, describe: Describe) -> None:
        self._writer = writer
        self._describe = describe
        self.resumes = writer.target != "-"
        self._paths = {identity[0] for identity in writer.done if isinstance(identity, tuple)}

    def has(self, item: MediaItem) -> bool:
        """By path, and by modality where the item says one."""
        if item.modality is None:
            return item.path in self._paths
        return (item.path, item.modality) in self._writer.done

    def write(self, result: Encoded) -> None:
        """Writes the item's record with what `describe` adds."""
        self._writer.write({**result.item.output(result.modality), **self._describe(result)})
        self._paths.add(result.item.path)

    def write_error(self, record: Record) -> None:
        """Writes it among the others."""
        self._writer.write(record)


class StoreSink:
    """An embedding store; errors go to standard output.

    Args:
        store: open for appending.
        options: how media become tensors.
        log_every: media between two lines of the log on standard output; 0 for no log.
    """

    resumes = True

    def __init__(self, store: EmbeddingStore, options: MediaOptions, *, log_every: int = 0) -> None:
        self._store = store
        self._options = options
        self._log_every = log_every
        self._n = 0

    def has(self, item: MediaItem) -> bool:
        """By name and preprocessing."""
        modalities = MODALITIES if item.modality is None else (item.modality,)
        return any(
            self._store.get(
                modality, name=item.name, fingerprint=self._options.fingerprint(modality)
            )
            is not None
            for modality in modalities
        )

    def recall(self, modality: str, sha256: str) -> torch.Tensor | None:
        """The embedding of the same content under another name, if there is one."""
        fingerprint = self._options.fingerprint(modality)
        return self._store.recall(modality, sha256, fingerprint)

    def write(self, result: Encoded) -> None:
        """Adds a row, and a line to the log now and then."""
        if result.modality is None or result.sha256 is None:
            raise ValueError(f"{result.item.path} has no content")
        self._store.add(
            result.item.name,
            result.modality,
            result.sha256,
            self._options.fingerprint(result.modality),
            _embedding(result),
        )
        self._n += 1
        if self._log_every and self._n % self._log_every == 0:
            emit_record({"step": self._n, "rows": len(self._store)})

    def write_error(self, record: Record) -> None:
        """Writes it to standard output."""
        emit_record(record)


class TextSink:
    """Lines for a person at a terminal.

    Args:
        show: prints a line.
        describe: makes a record of a result.
    """

    resumes = False

    def __init__(self, show: Callable[[str], object], describe: Describe) -> None:
        self._show = show
        self._describe = describe

    def has(self, item: MediaItem) -> bool:
        """Never: a terminal is not continued."""
        return False

    def write(self, result: Encoded) -> None:
        """Shows the likeliest labels, or the first numbers of an embedding."""
        record = self._describe(result)
        if "labels" in record:
            found = [f"{e['probability']:.1%} {e['label']}" for e in record["labels"]]
        else:
            numbers = record["embedding"]
            found = [f"{len(numbers)} numbers"]
            found.append(" ".join(f"{x:.4f}" for x in numbers[:_SHOWN_NUMBERS]) + " ...")
        self._show(f"{result.item.path}  {result.modality}  {', '.join(found)}")

    def write_error(self, record: Record) -> None:
        """Shows the reason."""
        self._show(f"error: {record['error']}")


def embedding_records(encoder: Encoder, *, normalize: bool) -> tuple[Describe, Record]:
    """Returns what makes a record of an embedding, and the keys that say how it was made.

    Args:
        encoder: whose embeddings they are.
        normalize: scale them to length 1.
    """
    made_with = {"encoder": _identity(encoder), "normalized": normalize}

    def describe(result: Encoded) -> Record:
        embedding = _embedding(result)
        if normalize:
            embedding = F.normalize(embedding, dim=-1)
        # the shortest decimals that mean the same float32: half as long as those of a float64
        numbers = [float(str(number)) for number in embedding.numpy()]
        return {"embedding": numbers, **made_with}

    return describe, made_with


def label_records(
    encoder: Encoder, labels: Sequence[str], *, prompt: str, top_k: int
) -> tuple[Describe, Record]:
    """Returns what makes a record of the likeliest labels of an embedding; see `LabelScorer`.

    Returns with it the keys that say how the records were made: the encoder, and a hash of the
    labels and the prompt.
    """
    scorer = LabelScorer(encoder, labels, prompt)
    asked = hashlib.sha256("\n".join([prompt, *labels]).encode()).hexdigest()
    made_with = {"encoder": _identity(encoder), "label_set": asked[:_SHOWN_DIGITS]}

    def describe(result: Encoded) -> Record:
        best = scorer.score(_embedding(result), top_k)
        return {"labels": [asdict(entry) for entry in best], **made_with}

    return describe, made_with


def _identity(encoder: Encoder) -> str:
    return f"{encoder.name}@{encoder.sha256[:_SHOWN_DIGITS]}"


def _embedding(result: Encoded) -> torch.Tensor:
    if result.embedding is None:
        raise ValueError(f"{result.item.path} has no embedding")
    return result.embedding

"""One run of `encode`: what is missing is encoded and written, what is there is left alone.

Knows nothing of options; the command builds an `EncodeRequest`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import IO, Literal

import torch

from chatbind_cli import launch
from chatbind_cli.artifacts import artifact_record, emit_artifact
from chatbind_cli.console import Progress, note
from chatbind_cli.data.encode_sinks import (
    RecordSink,
    Sink,
    StoreSink,
    TextSink,
    embedding_records,
    label_records,
)
from chatbind_cli.data.encoding import Encoded, EncodingOptions, encode_items, encode_share
from chatbind_cli.data.media_items import (
    MediaItem,
    items_of_list,
    items_of_paths,
    items_of_training_file,
)
from chatbind_cli.data.store import EmbeddingStore, clear_store
from chatbind_cli.errors import UsageError
from chatbind_cli.imagebind.encoder import Encoder, load_encoder
from chatbind_cli.imagebind.zero_shot import DEFAULT_PROMPT
from chatbind_cli.jsonl import RecordWriter
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.root import MediaRoot

_LOG_EVERY = 1000  # media, while a store is filled


@dataclass(frozen=True, kw_only=True)
class EncodeRequest:
    """What `encode` was asked for.

    Attributes:
        encoder: the encoder's weights file or folder.
        paths: paths, URLs and data URIs.
        listed: a list of paths or records, `-` for stdin.
        stdin: the stream that `-` stands for.
        training_file: conversations or questions whose media are wanted.
        media_root: where the media of records lie.
        modality: of media whose record does not say.
        media: how files become tensors.
        output: the record file, `-` for stdout.
        normalize: length 1 in records.
        labels: a file of labels to compare with, instead of writing embeddings.
        label_prompt: the text for a label.
        top_k: labels in a record.
        store: an embedding store to fill, instead of writing records.
        store_dtype: of a new store.
        overwrite: start the output anew.
        on_error: what becomes of a medium that cannot be encoded.
        device: where the encoder works.
        dtype: of its weights.
        batch_size: pictures or clips at a time on a GPU.
        workers: threads that decode ahead.
    """

    encoder: Path
    paths: tuple[str, ...] = ()
    listed: str | None = None
    stdin: IO[bytes] | None = None
    training_file: Path | None = None
    media_root: MediaRoot = field(default_factory=MediaRoot)
    modality: str | None = None
    media: MediaOptions = field(default_factory=MediaOptions)
    output: str = "-"
    normalize: bool = True
    labels: Path | None = None
    label_prompt: str = DEFAULT_PROMPT
    top_k: int = 5
    store: Path | None = None
    store_dtype: str | None = None
    overwrite: bool = False
    on_error: Literal["record", "skip", "fail"] = "record"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    batch_size: int = 16
    workers: int = 2


@dataclass
class Outcome:
    """How many media were encoded, were there already, and failed."""

    encoded: int = 0
    reused: int = 0
    failed: int = 0


def encode(request: EncodeRequest) -> Outcome:
    """Does what was asked for; called on every process of a launched command.

    Returns:
        What was done, on the first process; zeros on the others.

    Raises:
        ChatBindError: the encoder, the list or the output cannot be used, or a medium fails and
            `on_error` is "fail".
    """
    encoder = load_encoder(
        request.encoder,
        device=request.device,
        dtype=request.dtype,
        batch_size=request.batch_size,
    )
    options = EncodingOptions(
        media=request.media,
        workers=request.workers,
        batch_size=1 if request.device.type == "cpu" else request.batch_size,
    )
    if launch.rank() != 0:
        for _ in encode_share(None, encoder, options):
            raise AssertionError("only the first process gets results")
        return Outcome()
    only_paths = request.listed is None and request.training_file is None
    total = len(request.paths) if only_paths else None
    outcome = Outcome()
    with ExitStack() as stack:
        sink = _open_sink(stack, encoder, request)
        if isinstance(sink, StoreSink):
            options = replace(options, recall=sink.recall)
        progress = stack.enter_context(Progress(total, "encoding", "files"))
        missing = _missing(wanted_items(request), sink, outcome)
        if launch.world_size() > 1:
            results = encode_share(list(missing), encoder, options)
        else:
            results = encode_items(missing, encoder, options)
        for result in stack.enter_context(closing(results)):
            _take(result, sink, outcome, request.on_error)
            progress.advance()
    _conclude(outcome, encoder, request.store)
    return outcome


def wanted_items(request: EncodeRequest) -> Iterator[MediaItem]:
    """Yields what to encode: the paths, then the list, then the training file."""
    root, modality = request.media_root, request.modality
    parts: list[Iterable[MediaItem]] = [items_of_paths(request.paths, root, modality)]
    if request.listed is not None:
        parts.append(items_of_list(request.listed, root, modality, stdin=request.stdin))
    if request.training_file is not None:
        parts.append(items_of_training_file(request.training_file, root, modality))
    return chain.from_iterable(parts)


def _missing(items: Iterable[MediaItem], sink: Sink, outcome: Outcome) -> Iterator[MediaItem]:
    """Yields each item that the sink has not, and that has not come before."""
    if not sink.resumes:
        yield from items
        return
    seen: set[tuple[str, str | None]] = set()
    for item in items:
        key = (item.path, item.modality)
        if item.problem is None and key in seen:
            continue
        seen.add(key)
        if item.problem is None and sink.has(item):
            outcome.reused += 1
        else:
            yield item


def _open_sink(stack: ExitStack, encoder: Encoder, request: EncodeRequest) -> Sink:
    if request.store is not None:
        if request.overwrite:
            clear_store(request.store)
        store = EmbeddingStore.open(
            request.store,
            "a",
            encoder_sha256=encoder.sha256,
            encoder_name=encoder.name,
            dim=encoder.embedding_dim,
            dtype=request.store_dtype,
            encoder_dtype=encoder.dtype_name,
            media_options=request.media.deciding(),
        )
        return StoreSink(stack.enter_context(store), request.media, log_every=_LOG_EVERY)
    if request.labels is None:
        describe, made_with = embedding_records(encoder, normalize=request.normalize)
    else:
        describe, made_with = label_records(
            encoder, _lines(request.labels), prompt=request.label_prompt, top_k=request.top_k
        )
    if request.output == "-" and sys.stdout.isatty():
        return TextSink(_print_line, describe)
    writer = RecordWriter(
        request.output,
        key=("path", "modality"),
        overwrite=request.overwrite,
        expect=made_with,
    )
    return RecordSink(stack.enter_context(writer), describe)


def _print_line(line: str) -> None:
    """Shows a line to the person at the terminal."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _take(result: Encoded, sink: Sink, outcome: Outcome, on_error: str) -> None:
    if result.error is None:
        sink.write(result)
        outcome.encoded += 1
        return
    outcome.failed += 1
    if on_error == "fail":
        raise result.error
    if on_error == "skip":
        note(f"left out: {result.error}")
        return
    sink.write_error({**result.item.output(result.modality), "error": str(result.error)})


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot be read as labels: {error}", where=str(path)) from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _conclude(outcome: Outcome, encoder: Encoder, store: Path | None) -> None:
    reused = f", {outcome.reused} were there already" if outcome.reused else ""
    failed = f", {outcome.failed} failed" if outcome.failed else ""
    note(f"{outcome.encoded} files encoded{reused}{failed}")
    if store is not None:
        rows = len(EmbeddingStore.open(store))
        identity = {"name": encoder.name, "sha256": encoder.sha256}
        emit_artifact(
            artifact_record("store", store, made_by="encode", rows=rows, encoder=identity)
        )

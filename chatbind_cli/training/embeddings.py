"""Embeddings for training: every distinct medium encoded once, before the first step.

Encoders are frozen, so their work is done ahead and kept in embedding stores under the run's
folder, one for each process, which a rerun continues. After that training needs neither encoders
nor media. Each of several encoders sees all media that it knows, and has stores of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from chatbind_cli import worker
from chatbind_cli.console import Progress, note
from chatbind_cli.data.embedding_cache import EmbeddingCache
from chatbind_cli.data.encode import StoreSink, writable_store
from chatbind_cli.data.encoding import EncodingOptions, at_once, encode_items
from chatbind_cli.data.lookup import Embeddings, WideEmbeddings, open_parts, part_name
from chatbind_cli.data.media_items import MediaItem
from chatbind_cli.encoders.encoder import Encoder
from chatbind_cli.encoders.identity import identity_of
from chatbind_cli.errors import RecordError
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.root import MediaRoot
from chatbind_cli.model.config import EncoderInfo
from chatbind_cli.training.encoders import (
    Before,
    assumed_encoder,
    joined,
    modalities_of,
    open_all,
    tell_of,
)
from chatbind_cli.training.inputs import Inputs, read_rejected, refuse_rejected, save_rejected
from chatbind_cli.training.rundir import REJECTED_FILE, RunFolder
from chatbind_cli.training.settings import TrainingSettings

_READERS = 8  # threads or processes that decode ahead while a GPU encodes


def known_media(settings: TrainingSettings, inputs: Inputs, encoders: Sequence[Encoder]) -> Inputs:
    """The inputs without media of modalities that no encoder knows.

    Raises:
        RecordError: there are such (unless they are to be skipped), or nothing is left.
    """
    kinds = [modalities_of(encoder) for encoder in encoders]
    unknown = [m for m in inputs.media.modalities() if not any(m in known for known in kinds)]
    if not unknown:
        return inputs
    names = {modality: inputs.media.names(modality) for modality in unknown}
    pairs = zip(encoders, kinds, strict=True)
    they = "; ".join(f"{encoder.name} knows {', '.join(known)}" for encoder, known in pairs)
    if settings.on_error == "fail":
        counts = " and ".join(f"{len(some):,} media of {m}" for m, some in names.items())
        raise RecordError(
            f"the data have {counts}, which no encoder knows: {they}",
            hint="add an encoder that does (--encoder), or leave them out with --on-error skip",
        )
    return inputs.leave_out(
        {
            Medium(modality, name): f"{name}: no encoder knows {modality}: {they}"
            for modality, some in names.items()
            for name in some
        }
    )


def embedded(
    settings: TrainingSettings, inputs: Inputs, folder: RunFolder
) -> tuple[Inputs, WideEmbeddings, EncoderInfo, MediaOptions]:
    """Encodes what no process of this or an earlier run has; leaves out what cannot be read."""
    before = Before.of(settings)
    options = MediaOptions.known(before.media_options)
    if not inputs.encoders:
        info = before.encoder or assumed_encoder()
        return inputs, WideEmbeddings([Embeddings([])], info.widths), info, options
    encoders = open_all(inputs.encoders, settings, before)
    inputs = known_media(settings, inputs, encoders)
    info = joined([identity_of(encoder) for encoder in encoders])
    before.check(info)
    for encoder in encoders:
        tell_of(encoder)
    kinds = [modalities_of(encoder) for encoder in encoders]
    ways = [encoder.heeded(options) for encoder in encoders]
    places = [folder.path / place for place in stores_below(len(encoders))]
    listed = folder.path / REJECTED_FILE
    # once training has begun, the set of its samples stays as it is
    bad = read_rejected(listed) if folder.last_checkpoint() is not None else {}

    def kept() -> WideEmbeddings:
        each = zip(places, ways, kinds, strict=True)
        parts = [Embeddings(open_parts(place), way, known) for place, way, known in each]
        return WideEmbeddings(parts, info.widths)

    missing = [[m for m in part.missing(inputs.media) if m not in bad] for part in kept().parts]
    # every process must have looked before the first one adds to what there is
    PartialState().wait_for_everyone()
    failed = []
    for place, way, lacking in zip(places, ways, missing, strict=True):
        encoder = encoders.pop(0)  # whose towers go when the next one's come
        mine, part = lacking[worker.rank() :: worker.world_size()], place / part_name(worker.rank())
        cache = settings.embedding_cache
        failed += encode_media(mine, encoder, settings.media_root, part, way, cache)
    inputs = inputs.leave_out(bad | dict(gather_object(failed)))
    if worker.rank() == 0:
        save_rejected(inputs.rejected, listed)
    if settings.on_error == "fail":
        refuse_rejected(inputs.rejected, listed)
    PartialState().wait_for_everyone()
    return inputs, kept(), info, ways[0] if len(ways) == 1 else options


def stores_below(encoders: int) -> Sequence[str]:
    """Where in a run's folder the embeddings of each encoder are; `--store` takes such a place."""
    if encoders < 2:
        return ["embeddings"]
    return [f"embeddings/encoder-{number}" for number in range(1, encoders + 1)]


def encode_media(
    media: Sequence[Medium],
    encoder: Encoder,
    root: MediaRoot,
    part: Path,
    options: MediaOptions,
    cache_folder: Path | None = None,
) -> list[tuple[Medium, str]]:
    """Encodes one process's share of media, without repeats, into its own store.

    What a run before has left in the cache is copied from there, see `EmbeddingCache`.

    Returns:
        The media that cannot be read, each with the reason.
    """
    items = [MediaItem(medium, root, medium.name) for medium in media]
    failed: list[tuple[Medium, str]] = []
    batch = at_once(encoder)
    how = EncodingOptions(media=options, workers=_READERS, batch_size=batch, decode_in="auto")
    with (
        writable_store(part, encoder, options) as store,
        closing(EmbeddingCache(cache_folder, encoder, options)) as cache,
        Progress(len(items), "encoding media", "files") as progress,
    ):
        sink, new = StoreSink(store, options), []
        for item in items:
            if (found := cache.find(item)) is None:
                new.append(item)
            else:
                sink.write(found)
                progress.advance()
        if len(new) < len(items):
            note(f"{len(items) - len(new):,} embeddings were there already, in {cache_folder}")

        def recall(modality: str, sha256: str) -> torch.Tensor | None:
            known = sink.recall(modality, sha256)
            return cache.recall(modality, sha256) if known is None else known

        for result in encode_items(new, encoder, how, recall):
            if result.error is None:
                sink.write(result)
                cache.keep(result)
            else:
                failed.append((result.item.medium, str(result.error)))
            progress.advance()
    return failed

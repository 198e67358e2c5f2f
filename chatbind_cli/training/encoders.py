"""Which encoders a run's embeddings come from, and what is said of them.

They are named and opened, or have filled stores before; training may go on from what was trained
with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations, zip_longest
from typing import Any

import torch

from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.checkpoints.projector_file import is_published, read_projector
from chatbind_cli.console import note
from chatbind_cli.data.conversations import Media
from chatbind_cli.data.lookup import Embeddings, SeveralEmbeddings, open_stores, options_in
from chatbind_cli.device import resolve_dtype
from chatbind_cli.encoders.encoder import Encoder
from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.encoders.several import sha256_of_several
from chatbind_cli.errors import StoreError, UsageError
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.model.config import (
    MODEL_TYPE,
    ChatBindConfig,
    EncoderInfo,
    encoder_of,
    identity_of,
)
from chatbind_cli.model.loading import read_published
from chatbind_cli.training.arguments import on_gpu
from chatbind_cli.training.settings import TrainingSettings

_IMAGEBIND_WIDTH = 1024


def trained_on(settings: TrainingSettings) -> tuple[EncoderInfo | None, dict[str, Any]]:
    """What made the embeddings of the projector, or ChatBind model, that training goes on from.

    Returns:
        The encoder, None where training begins from nothing; and how media became tensors, empty
        where nothing says.

    Raises:
        ChatBindError: the projector or model cannot be read.
    """
    if settings.projector is not None:
        info = read_projector(settings.projector).info
        return encoder_of(info), info.media_options
    if is_published(settings.model):
        config = read_published(settings.model)[0]
    else:
        fields = read_json(settings.model / "config.json")
        if fields.get("model_type") != MODEL_TYPE:
            return None, {}
        config = ChatBindConfig.from_dict(fields)
    return encoder_of(config), config.media_options or {}


def open_all(
    references: Sequence[str], settings: TrainingSettings, trained: EncoderInfo | None
) -> list[Encoder]:
    """The encoders of a run, which go on in the dtype that training was begun with.

    Raises:
        ChatBindError: see `open_encoder`.
    """
    device = "cuda" if on_gpu(settings) else "cpu"
    dtype = resolve_dtype((trained and trained.dtype) or "auto", torch.device(device))
    return [open_encoder(one, device=device, dtype=dtype) for one in references]


def modalities_of(encoder: Encoder) -> list[str]:
    """The modalities of media that it knows."""
    return [modality for modality in encoder.modalities if modality != "text"]


def tell_of(encoder: Encoder) -> None:
    """Notes the licence of its weights, and whether what is learned with it can carry over."""
    if encoder.licence is not None:
        note(f"licence of the weights of {encoder.name}: {encoder.licence}")
    known = modalities_of(encoder)
    if len(known) == 1:
        note(
            f"what is learned with {encoder.name} will not carry over to other modalities: "
            f"it knows {known[0]} alone"
        )


def refuse_twice(encoders: Sequence[Encoder]) -> None:
    """Refuses what `joined` will, before anything heavy: hashes only encoders of equal sizes.

    Raises:
        UsageError: two of them are the same.
    """
    for one, other in combinations(encoders, 2):
        if one.settings == other.settings:
            joined([identity_of(one), identity_of(other)])


def joined(infos: Sequence[EncoderInfo]) -> EncoderInfo:
    """What a model says of its encoder, or of several as one.

    Raises:
        UsageError: two of them are the same.
    """
    if len(infos) == 1:
        return infos[0]
    hashes = [str(one.sha256) for one in infos]
    first: dict[str, EncoderInfo] = {}
    for one, sha256 in zip(infos, hashes, strict=True):
        if first.setdefault(sha256, one) is not one:
            raise UsageError(
                f"{one.path or one.name} has the weights of {first[sha256].path or one.name}",
                hint="name every encoder once",
            )
    paths = [one.path for one in infos if one.path]
    licences = dict.fromkeys(one.licence for one in infos if one.licence)
    return EncoderInfo(
        name="+".join(one.name for one in infos),
        sha256=sha256_of_several(hashes),
        embedding_dim=sum(one.embedding_dim for one in infos),
        path=" + ".join(paths) if len(paths) == len(infos) else None,
        dtype=infos[0].dtype,
        licence=" and ".join(licences) or None,
        parts=tuple(infos),
    )


def stored_embeddings(
    settings: TrainingSettings, media: Media
) -> tuple[Embeddings, EncoderInfo, MediaOptions]:
    """The embeddings in the stores of the settings, and what made them.

    Raises:
        StoreError: they were made by other encoders than the settings name, in other ways than
            the training before, or in several.
        UsageError: two stores are of one encoder.
    """
    groups = [open_stores(folder) for folder in settings.stores]
    trained = trained_on(settings)[1]
    options = options_in(list(chain.from_iterable(groups)), media.modalities(), trained)
    infos = []
    for folder, stores, named in zip_longest(settings.stores, groups, settings.encoders):
        meta = stores[0].meta
        encoder = open_encoder(named) if named is not None else None
        if encoder is not None and encoder.sha256 != meta.encoder_sha256:
            raise StoreError(
                f"was made by another encoder ({meta.encoder_name}) than --encoder names"
                + (f", which is {encoder.name}" if len(groups) > 1 else ""),
                where=str(folder),
            )
        infos.append(
            EncoderInfo(
                name=meta.encoder_name,
                sha256=meta.encoder_sha256,
                embedding_dim=meta.dim,
                path=encoder.reference if encoder else None,
                dtype=meta.encoder_dtype,
                licence=encoder.licence if encoder else None,
            )
        )
    info = joined(infos)
    if len(groups) == 1:
        return Embeddings(groups[0], options), info, options
    # what none of its stores holds an encoder is taken not to know
    kinds = [{kind for store in stores for kind, _ in store.kinds()} for stores in groups]
    parts = [Embeddings(some, options, known) for some, known in zip(groups, kinds, strict=True)]
    return SeveralEmbeddings(parts, info.widths), info, options


def assumed_encoder() -> EncoderInfo:
    """The encoder of a training that sees no media, where none is named."""
    note(
        f"the data name no media, and there is no --encoder: assuming embeddings of width "
        f"{_IMAGEBIND_WIDTH}, as ImageBind-Huge makes them"
    )
    return EncoderInfo(name="none", sha256=None, embedding_dim=_IMAGEBIND_WIDTH)

"""Which encoders a run's embeddings come from, and what is said of them.

They are named and opened, or have filled stores before; training may go on from what was trained
with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, combinations, repeat, zip_longest
from pathlib import Path
from typing import Any

import torch

from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.checkpoints.projector_file import ProjectorInfo, is_published, read_projector
from chatbind_cli.console import note
from chatbind_cli.data.conversations import Media
from chatbind_cli.data.database import StoreMeta
from chatbind_cli.data.lookup import Embeddings, WideEmbeddings, open_stores, options_in
from chatbind_cli.device import resolve_dtype
from chatbind_cli.encoders.encoder import Encoder
from chatbind_cli.encoders.identity import identity_of
from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.encoders.reference import is_reference
from chatbind_cli.encoders.several import licence_of_several, sha256_of_several
from chatbind_cli.errors import StoreError, UsageError
from chatbind_cli.media.medium import is_there
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.model.config import (
    MODEL_TYPE,
    ChatBindConfig,
    EncoderInfo,
    check_encoder,
    encoder_of,
)
from chatbind_cli.model.loading import read_published
from chatbind_cli.training.arguments import on_gpu
from chatbind_cli.training.settings import TrainingSettings

_IMAGEBIND_WIDTH = 1024


@dataclass(frozen=True)
class Before:
    """What training goes on from, as far as its media are concerned.

    Attributes:
        config: of the projector or ChatBind model; None: training begins from nothing.
        where: the projector or the model.
    """

    config: ProjectorInfo | ChatBindConfig | None
    where: str

    @classmethod
    def of(cls, settings: TrainingSettings) -> Before:
        """That of a run.

        Raises:
            ChatBindError: the projector or model cannot be read.
        """
        if settings.projector is not None:
            return cls(read_projector(settings.projector).info, str(settings.projector))
        if is_published(settings.model):
            return cls(read_published(settings.model)[0], str(settings.model))
        fields = read_json(settings.model / "config.json")
        ours = fields.get("model_type") == MODEL_TYPE
        return cls(ChatBindConfig.from_dict(fields) if ours else None, str(settings.model))

    @property
    def media_options(self) -> dict[str, Any]:
        """How media became tensors; empty where nothing says."""
        return (self.config.media_options if self.config is not None else None) or {}

    @property
    def encoder(self) -> EncoderInfo | None:
        """What made the embeddings."""
        return encoder_of(self.config) if self.config is not None else None

    @property
    def references(self) -> tuple[str, ...]:
        """What opens it, or the several that it is; empty where that of one is not said."""
        said = [one.path for one in self.encoder.each] if self.encoder is not None else []
        return tuple(one for one in said if one) if all(said) else ()

    @property
    def gone(self) -> tuple[str, ...]:
        """Which of `references` are paths where nothing is."""
        return tuple(one for one in self.references if not is_reference(one) and not is_there(one))

    def check(self, encoder: EncoderInfo) -> None:
        """Refuses another encoder than that of the training before.

        Raises:
            CheckpointError: see `check_encoder`.
        """
        if self.config is not None:
            check_encoder(self.config, encoder, where=self.where)


def open_all(
    references: Sequence[str], settings: TrainingSettings, before: Before
) -> list[Encoder]:
    """The encoders of a run, which go on in the dtypes that training was begun with.

    Raises:
        ChatBindError: see `open_encoder`.
    """
    device = torch.device("cuda" if on_gpu(settings) else "cpu")
    known = before.encoder.each if before.encoder else ()
    dtypes = [*(one.dtype for one in known), *repeat(None, len(references))]
    return [
        open_named(one, settings, device=device, dtype=resolve_dtype(dtype or "auto", device))
        for one, dtype in zip(references, dtypes, strict=False)
    ]


def open_named(reference: str, settings: TrainingSettings, **how: Any) -> Encoder:
    """An encoder of a run; what others have written into a projector is no wish to fetch it.

    Raises:
        ChatBindError: see `open_encoder`.
    """
    return open_encoder(reference, fetch=bool(settings.encoders), **how)


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
    return EncoderInfo(
        name="+".join(one.name for one in infos),
        sha256=sha256_of_several(hashes),
        embedding_dim=sum(one.embedding_dim for one in infos),
        path=" + ".join(paths) if len(paths) == len(infos) else None,
        dtype=infos[0].dtype,
        licence=licence_of_several([one.licence for one in infos]),
        parts=tuple(infos),
    )


def stored_embeddings(
    settings: TrainingSettings, media: Media
) -> tuple[WideEmbeddings, EncoderInfo, MediaOptions]:
    """The embeddings in the stores of the settings, and what made them.

    Raises:
        StoreError: they were made by other encoders than the settings name, in other ways than
            the training before, or in several; or one was made by several encoders at once.
        CheckpointError: they were made by other encoders than those of the training before.
        UsageError: two stores are of one encoder.
    """
    groups = [open_stores(folder) for folder in settings.stores]
    before = Before.of(settings)
    everything = list(chain.from_iterable(groups))
    options = options_in(everything, media.modalities(), before.media_options)
    named = zip_longest(settings.stores, groups, settings.encoders)
    infos = [_made_with(folder, stores[0].meta, word) for folder, stores, word in named]
    info = joined(infos)
    before.check(info)
    # what none of its stores holds an encoder is taken not to know
    kinds = [{kind for store in stores for kind, _ in store.kinds()} for stores in groups]
    parts = [Embeddings(some, options, known) for some, known in zip(groups, kinds, strict=True)]
    return WideEmbeddings(parts, info.widths), info, options


def _made_with(folder: Path, meta: StoreMeta, named: str | None) -> EncoderInfo:
    """The encoder that a store says, and the user names if he does."""
    if meta.encoders > 1:
        raise StoreError(
            f"has rows of several encoders side by side ({meta.encoder_name}), each medium by "
            "the first that knows it: not every projector would learn of pictures",
            where=str(folder),
            hint="encode with each encoder into a store of its own, and name all of them",
        )
    encoder = open_encoder(named) if named is not None else None
    if encoder is not None and encoder.sha256 != meta.encoder_sha256:
        raise StoreError(
            f"was made by {meta.encoder_name} ({meta.encoder_sha256[:12]}), and --encoder names "
            f"{encoder.name} ({encoder.sha256[:12]})",
            where=str(folder),
        )
    return EncoderInfo(
        name=meta.encoder_name,
        sha256=meta.encoder_sha256,
        embedding_dim=meta.dim,
        path=encoder.reference if encoder else None,
        dtype=meta.encoder_dtype,
        licence=encoder.licence if encoder else None,
    )


def assumed_encoder() -> EncoderInfo:
    """The encoder of a training that sees no media, where none is named."""
    note(
        f"the data name no media, and there is no --encoder: assuming embeddings of width "
        f"{_IMAGEBIND_WIDTH}, as ImageBind-Huge makes them"
    )
    return EncoderInfo(name="none", sha256=None, embedding_dim=_IMAGEBIND_WIDTH)

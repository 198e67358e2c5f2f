"""Whether encoder, projector, tokenizer and model belong together: each misfit is one clear error.

How they are loaded and put together is not known here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chatbind_cli.errors import CheckpointError
from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration, word_embeddings
from chatbind_cli.model.config import ChatBindConfig
from chatbind_cli.model.tokenizer import media_token_ids
from chatbind_cli.weights.projector_file import ProjectorFile, ProjectorInfo


@dataclass(frozen=True, kw_only=True)
class EncoderInfo:
    """Which encoder a model belongs to.

    Args:
        name: for people.
        sha256: of its weights file; None if it is not known.
        embedding_dim: width of its embeddings.
        path: where it lay when the model was made.
        dtype: the numbers in which it worked, where that is known.
    """

    name: str
    sha256: str | None
    embedding_dim: int
    path: str | None = None
    dtype: str | None = None

    def as_record(self) -> dict[str, Any]:
        """The same for a configuration, which says nothing of a dtype that is not known."""
        return {k: v for k, v in asdict(self).items() if v is not None or k != "dtype"}


def encoder_of(trained: ProjectorInfo | ChatBindConfig) -> EncoderInfo:
    """The encoder that a projector or model was trained with, as far as its file tells."""
    known = trained.encoder or {}
    return EncoderInfo(
        name=known.get("name") or "imagebind",
        sha256=known.get("sha256"),
        embedding_dim=trained.embedding_dim,
        path=known.get("path"),
        dtype=known.get("dtype"),
    )


def _check_dtype(trained: str | None, encoder: EncoderInfo, where: str | None) -> None:
    if trained and encoder.dtype and trained != encoder.dtype:
        raise CheckpointError(
            f"was trained on embeddings that were computed in {trained}, and these were in "
            f"{encoder.dtype}",
            where=where,
            hint=f"encode the media with --dtype {trained}",
        )


def check_encoder(config: ChatBindConfig, encoder: EncoderInfo, where: str | None = None) -> None:
    """Refuses an encoder that is not the model's.

    Raises:
        CheckpointError: the width differs, or both hashes are known and differ.
    """
    own = config.encoder or {}
    if encoder.embedding_dim != config.embedding_dim:
        raise CheckpointError(
            f"the model reads embeddings of width {config.embedding_dim}, the encoder "
            f"{encoder.name} gives {encoder.embedding_dim}",
            where=where,
            hint="name the encoder that the model was trained with (--encoder)",
        )
    if own.get("sha256") and encoder.sha256 and own["sha256"] != encoder.sha256:
        raise CheckpointError(
            f"the model was trained with the encoder {own.get('name')} "
            f"({own['sha256'][:12]}), not with {encoder.name} ({encoder.sha256[:12]})",
            where=where,
            hint="name the encoder that the model was trained with (--encoder)",
        )
    _check_dtype(own.get("dtype"), encoder, where)


def check_projector(
    projector: ProjectorFile, encoder: EncoderInfo, hidden_size: int, where: str
) -> None:
    """Refuses a projector that fits another encoder or language model.

    Raises:
        CheckpointError: a width or the encoder differs.
    """
    info = projector.info
    if info.hidden_size != hidden_size:
        raise CheckpointError(
            f"the projector makes tokens of width {info.hidden_size}, the language model reads "
            f"{hidden_size}",
            where=where,
            hint="use the language model that it was trained with",
        )
    if info.embedding_dim != encoder.embedding_dim:
        raise CheckpointError(
            f"the projector reads embeddings of width {info.embedding_dim}, the encoder "
            f"{encoder.name} gives {encoder.embedding_dim}",
            where=where,
        )
    trained = info.encoder.get("sha256")
    if trained and encoder.sha256 and trained != encoder.sha256:
        raise CheckpointError(
            f"the projector was trained with the encoder {info.encoder.get('name')} "
            f"({trained[:12]}), not with {encoder.name} ({encoder.sha256[:12]})",
            where=where,
        )
    _check_dtype(info.encoder.get("dtype"), encoder, where)


def check_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuses a tokenizer with ids that a model has no embeddings for.

    Raises:
        CheckpointError: there is one.
    """
    rows = word_embeddings(model).num_embeddings
    wanted = max(tokenizer.get_vocab().values(), default=-1) + 1
    if wanted > rows:
        raise CheckpointError(
            f"the tokenizer has ids for {wanted} tokens, the model {rows} embeddings", where=where
        )


def check_vocabulary(
    model: ChatBindForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, where: str
) -> None:
    """Refuses a tokenizer that is not the model's.

    Raises:
        CheckpointError: media tokens have other ids, or there are more tokens than embeddings.
    """
    check_ids(model, tokenizer, where)
    for name, index in media_token_ids(tokenizer).items():
        own = getattr(model.config, name)
        if own is not None and own != index:
            raise CheckpointError(
                f"config.json says {name} = {own}, the tokenizer says {index}", where=where
            )

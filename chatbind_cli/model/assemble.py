"""A base language model and a projector become a ChatBind model, or a ChatBind model goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import chatbind_cli
from chatbind_cli.checkpoints.delta import refuse_unapplied
from chatbind_cli.checkpoints.projector_file import ProjectorFile, is_published, read_projector
from chatbind_cli.errors import CheckpointError
from chatbind_cli.model.base import grow_embeddings, quick_fingerprint
from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration, word_embeddings
from chatbind_cli.model.config import ChatBindConfig, EncoderInfo, check_encoder
from chatbind_cli.model.loading import (
    ChatBind,
    check_ids,
    is_chatbind,
    load_chatbind,
    load_into,
    read_published,
)
from chatbind_cli.model.pretrained import open_config, open_model
from chatbind_cli.model.prompts import get_style
from chatbind_cli.model.tokenizer import load_tokenizer, media_token_ids, prepare_tokenizer

# What a model is where neither the user nor the projector file says.
_DEFAULTS: dict[str, Any] = {
    "projector_type": "linear",
    "tokens_per_embedding": 1,
    "projector_layout": "split",
    "use_start_end": True,
    "prompt_style": "v0",
    "normalize_embeddings": True,
}


def build_chatbind(
    language_model: str | Path,
    *,
    encoder: EncoderInfo,
    projector: str | Path | None = None,
    stage: str = "pretrain",
    media_options: Mapping[str, Any] | None = None,
    command: str | None = None,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    quantization: Any = None,
    merge: bool = True,
    device_map: Any = None,
    **given: Any,
) -> ChatBind:
    """Makes a ChatBind model from a language model, or goes on from a ChatBind model.

    Args:
        language_model: folder of a causal language model; in stage `finetune` also
            of a ChatBind model, ours or published, which brings its projector.
        encoder: the encoder whose embeddings the model will read.
        projector: a projector file to start from.
        stage: `pretrain` or `finetune`.
        media_options: how media become tensors, for the record.
        command: the command line, for the record.
        dtype: type of the language model's weights; `auto`: as saved. A bare one's projector has
            float32, for training.
        attn_implementation: see `attention.resolve_attention`; None: transformers' choice.
        quantization: transformers' configuration of how a bare language model is packed.
        merge: whether adapters that a ChatBind model may have become part of its matrices.
        device_map: transformers'; `meta`: the same model without weights, which take no memory.
        **given: fields of `ChatBindConfig`: `projector_type`, `tokens_per_embedding`,
            `use_start_end`, `prompt_style`, `normalize_embeddings`. What is None or missing is as
            in the projector file, else as in `_DEFAULTS`; or as in the ChatBind model.

    Raises:
        CheckpointError: the language model cannot be read, or the parts do not fit together.
        UsageError: there is no such prompt style.
    """
    given = {name: value for name, value in given.items() if value is not None}
    held: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    held["device_map"] = device_map
    file = read_projector(projector) if projector is not None else None
    if stage == "finetune" and is_chatbind(Path(language_model)):
        _refuse_packing(quantization, where=str(language_model))
        bundle = load_chatbind(language_model, merge=merge, **held)
        _continue(bundle.config, given, encoder, where=str(language_model))
    else:
        chosen = _choices(file, given, where=str(projector))
        if quantization is not None:  # packed weights are made where they are used
            place = device_map or {"": torch.cuda.current_device()}
            held |= {"quantization_config": quantization, "device_map": place}
        bundle = _join(language_model, chosen, encoder, held)
    if file is not None:
        _put_projector(bundle.model, file, encoder, where=str(projector))
    config = bundle.config
    config.stage, config.encoder = stage, encoder.as_record()
    config.media_options = {**(config.media_options or {}), **(media_options or {})}
    config.provenance = _provenance(language_model, command)
    return bundle


def read_without_weights(
    language_model: str | Path, *, projector: str | Path | None = None, **given: Any
) -> tuple[PreTrainedTokenizerBase, ChatBindConfig]:
    """What `build_chatbind` would make of the same, but for the weights: tokenizer and config.

    Raises:
        CheckpointError: see there.
    """
    folder = Path(language_model)
    given = {name: value for name, value in given.items() if value is not None}
    if is_published(folder):
        config, tokenizer, _ = read_published(folder)
    elif is_chatbind(folder):
        config, tokenizer = cast(ChatBindConfig, open_config(folder)), load_tokenizer(folder)
    else:
        file = read_projector(projector) if projector is not None else None
        chosen = _choices(file, given, where=str(projector))
        tokenizer = _with_media_tokens(load_tokenizer(folder), chosen)
        text_config, tokens = open_config(folder), media_token_ids(tokenizer)
        return tokenizer, ChatBindConfig(text_config=text_config, **{**tokens, **chosen})
    for name, value in given.items():
        setattr(config, name, value)
    return tokenizer, config


def _with_media_tokens(
    tokenizer: PreTrainedTokenizerBase, chosen: Mapping[str, Any]
) -> PreTrainedTokenizerBase:
    padding = get_style(chosen["prompt_style"]).pad_token
    prepare_tokenizer(tokenizer, use_start_end=chosen["use_start_end"], pad_token=padding)
    return tokenizer


def _join(
    language_model: str | Path,
    chosen: Mapping[str, Any],
    encoder: EncoderInfo,
    held: Mapping[str, Any],
) -> ChatBind:
    """A language model with a fresh projector before it, and the tokens for media.

    Raises:
        CheckpointError: it cannot be used, or is a ChatBind model.
    """
    if is_chatbind(Path(language_model)):
        raise CheckpointError(
            "this is a ChatBind model, not a bare language model",
            where=str(language_model),
            hint="give the language model that it was made from",
        )
    text_config = open_config(language_model)
    refuse_unapplied(Path(language_model))
    tokenizer = load_tokenizer(language_model)
    base = open_model(language_model, config=text_config, **held)
    known = len(tokenizer)
    _with_media_tokens(tokenizer, chosen)
    grow_embeddings(base, len(tokenizer), known=known)
    check_ids(base, tokenizer, str(language_model))
    config = ChatBindConfig(
        text_config=base.config,
        embedding_dim=encoder.embedding_dim,
        encoder=encoder.as_record(),
        **{**media_token_ids(tokenizer), **chosen},
    )
    model = ChatBindForConditionalGeneration(config, base)
    # float32, which training wants it in: the first numbers do not depend on the base's
    model.projector.to(device=base.device, dtype=torch.float32)
    model.projector.reset_parameters(_word_size(base, known))
    return ChatBind(model, tokenizer, config)


def _refuse_packing(quantization: Any, *, where: str) -> None:
    """Refuses to pack what has a projector in it.

    Raises:
        CheckpointError: it is to be packed.
    """
    if quantization is not None:
        raise CheckpointError(
            "is a ChatBind model, which is not packed into fewer bits",
            where=where,
            hint="give the language model that it was made from, and --projector",
        )


def _continue(
    config: ChatBindConfig, given: Mapping[str, Any], encoder: EncoderInfo, *, where: str
) -> None:
    """Changes the configuration of a model whose training goes on.

    Raises:
        CheckpointError: it has another shape than the one asked for, or another encoder.
    """
    check_encoder(config, encoder, where=where)
    for name, value in given.items():
        if name in ("prompt_style", "normalize_embeddings"):
            setattr(config, name, value)
        elif value != getattr(config, name):
            raise CheckpointError(
                f"the model's {name} is {getattr(config, name)}, not {value}", where=where
            )


def _choices(file: ProjectorFile | None, given: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The options of a model: as given, else as the projector file says, else the defaults.

    Raises:
        CheckpointError: an option that shapes the projector contradicts the file.
        UsageError: there is no such prompt style.
    """
    told = {name: getattr(file.info, name) for name in _DEFAULTS} if file else {}
    for name in ("projector_type", "tokens_per_embedding"):
        if name in given and told.get(name) not in (None, given[name]):
            raise CheckpointError(
                f"the projector's {name} is {told[name]}, not {given[name]}", where=where
            )
    told = {name: value for name, value in told.items() if value is not None}
    chosen = {**_DEFAULTS, **told, **given}
    get_style(chosen["prompt_style"])
    return chosen


def _put_projector(
    model: ChatBindForConditionalGeneration, file: ProjectorFile, encoder: EncoderInfo, where: str
) -> None:
    """Gives a model the projector of a file.

    Raises:
        CheckpointError: it fits another encoder or language model.
    """
    width = word_embeddings(model).embedding_dim
    if file.info.hidden_size != width:
        raise CheckpointError(
            f"the projector makes tokens of width {file.info.hidden_size}, the language model "
            f"reads {width}",
            where=where,
            hint="use the language model that it was trained with",
        )
    check_encoder(file.info, encoder, where=where)
    load_into(model, file, where)


@torch.no_grad()
def _word_size(language_model: PreTrainedModel, known: int) -> float:
    """Root mean square of the entries of the word embeddings: what a soft token should be like."""
    weight = word_embeddings(language_model).weight[:known]
    if weight.is_meta:
        return 1.0
    size = float(torch.linalg.vector_norm(weight, dtype=torch.float32)) / weight.numel() ** 0.5
    return float(f"{size:.3g}") or 0.02  # in bfloat16 the words are of another size by 1e-5


def _provenance(language_model: str | Path, command: str | None) -> dict[str, Any]:
    base = {"name": str(language_model), "fingerprint": quick_fingerprint(Path(language_model))}
    versions = {
        "chatbind": chatbind_cli.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
    return {"command": command, "versions": versions, "language_model": base}

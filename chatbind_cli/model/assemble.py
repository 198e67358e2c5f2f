"""A base language model and a projector become a ChatBind model; a saved one is opened again.

Training, prompts and the encoder's inside are not known here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import chatbind_cli
from chatbind_cli.errors import CheckpointError
from chatbind_cli.folders import replace_folder
from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration, word_embeddings
from chatbind_cli.model.config import MODEL_TYPE, ChatBindConfig, saved_end_ids
from chatbind_cli.model.fit import (
    EncoderInfo,
    check_encoder,
    check_ids,
    check_projector,
    check_vocabulary,
)
from chatbind_cli.model.pretrained import open_config, open_model
from chatbind_cli.model.projector_weights import load_into
from chatbind_cli.model.prompts import get_style
from chatbind_cli.model.published_model import load_published
from chatbind_cli.model.quiet import quiet_transformers
from chatbind_cli.model.tokenizer import load_tokenizer, media_token_ids, prepare_tokenizer
from chatbind_cli.weights.delta_detection import refuse_unapplied
from chatbind_cli.weights.json_file import read_json
from chatbind_cli.weights.projector_file import ProjectorFile, read_projector
from chatbind_cli.weights.published import is_published

__all__ = [
    "ChatBind",
    "EncoderInfo",
    "build_chatbind",
    "check_encoder",
    "grow_embeddings",
    "load_chatbind",
    "save_chatbind",
    "versions",
]

_PROBE_BYTES = 1 << 20


@dataclass(frozen=True)
class ChatBind:
    """What belongs together: model, tokenizer and configuration.

    Args:
        model: the model.
        tokenizer: with the media tokens.
        config: the model's configuration (`model.config`).
    """

    model: ChatBindForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    config: ChatBindConfig


def build_chatbind(
    language_model: str | Path,
    *,
    encoder: EncoderInfo,
    projector: str | Path | None = None,
    projector_type: str | None = None,
    tokens_per_embedding: int | None = None,
    use_start_end: bool | None = None,
    prompt_style: str | None = None,
    normalize_embeddings: bool | None = None,
    stage: str = "pretrain",
    media_options: Mapping[str, Any] | None = None,
    command: str | None = None,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
) -> ChatBind:
    """Makes a ChatBind model from a language model, or goes on from a ChatBind model.

    What is None is as in the projector file, else linear, 1 token, start/end, v0, normalised; or
    as in the ChatBind model.

    Args:
        language_model: folder (or hub name) of a causal language model; in stage `finetune` also
            of a ChatBind model, ours or published, which brings its projector.
        encoder: the encoder whose embeddings the model will read.
        projector: a projector file to start from.
        projector_type: `linear` or `mlp2x_gelu`.
        tokens_per_embedding: soft tokens that one embedding becomes.
        use_start_end: whether `<im_start>` and `<im_end>` stand around them.
        prompt_style: a name of `prompts.style_names`.
        normalize_embeddings: whether embeddings are brought to norm 1 before the projector.
        stage: `pretrain` or `finetune`.
        media_options: how media become tensors, for the record.
        command: the command line, for the record.
        dtype: type of the weights; `auto`: as saved.
        attn_implementation: as in transformers (`sdpa`, `flash_attention_2`, ...).

    Raises:
        CheckpointError: the language model cannot be read, or the parts do not fit together.
        UsageError: there is no such prompt style.
    """
    shape = {"projector_type": projector_type, "tokens_per_embedding": tokens_per_embedding}
    habits = {"use_start_end": use_start_end, "normalize_embeddings": normalize_embeddings}
    given = {**shape, **habits, "prompt_style": prompt_style}
    start = read_projector(projector) if projector is not None else None
    if stage == "finetune" and _is_chatbind(Path(language_model)):
        opened = load_chatbind(language_model, dtype=dtype, attn_implementation=attn_implementation)
        config = _continued(opened, given, encoder, where=str(language_model))
        config.media_options = {**(config.media_options or {}), **(media_options or {})}
        config.provenance = _provenance(language_model, command)
        return _with_other_projector(opened, start, encoder, where=str(projector))
    chosen = _choices(start, given, where=str(projector))
    padding = get_style(chosen["prompt_style"]).pad_token
    text_config = _language_model_config(language_model)
    tokenizer = load_tokenizer(language_model)
    base = open_model(
        language_model, config=text_config, dtype=dtype, attn_implementation=attn_implementation
    )
    known = len(tokenizer)
    prepare_tokenizer(tokenizer, use_start_end=chosen["use_start_end"], pad_token=padding)
    grow_embeddings(base, len(tokenizer), known=known)
    check_ids(base, tokenizer, str(language_model))
    config = ChatBindConfig(
        text_config=base.config,
        embedding_dim=encoder.embedding_dim,
        encoder=encoder.as_record(),
        media_options=dict(media_options or {}),
        provenance=_provenance(language_model, command),
        **{**media_token_ids(tokenizer), **chosen, "stage": stage},
    )
    model = _with_projector(config, base, start, encoder, known=known, where=str(projector))
    return ChatBind(model, tokenizer, config)


def _with_other_projector(
    opened: ChatBind, start: ProjectorFile | None, encoder: EncoderInfo, where: str
) -> ChatBind:
    """A ChatBind model with the projector of a file in place of its own, if one is given."""
    if start is not None:
        check_projector(start, encoder, word_embeddings(opened.model).embedding_dim, where)
        load_into(opened.model, start, where)
    return opened


def load_chatbind(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    device_map: Any = None,
) -> ChatBind:
    """Opens a ChatBind model folder, ours or one in the published layout.

    Args:
        path: the folder.
        dtype: type of the weights; `auto`: as saved.
        device: where to put the model; where it is loaded unless given.
        attn_implementation: as in transformers.
        device_map: as in transformers, in place of `device`.

    Raises:
        CheckpointError: it is no ChatBind model, or its weights are incomplete.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            "has no config.json" if folder.is_dir() else "no such folder",
            where=str(path),
            hint="a model comes from `chatbind finetune`, and the published one from `chatbind "
            "download` and `chatbind apply-delta`",
        )
    refuse_unapplied(folder)
    options = {"dtype": dtype, "device_map": device_map}
    options["attn_implementation"] = attn_implementation
    load = load_published if is_published(folder) else _load_ours
    with quiet_transformers():
        model, tokenizer = load(folder, options)
    check_vocabulary(model, tokenizer, str(path))
    if device is not None and device_map is None:
        cast(Any, model).to(device)
    model.eval()
    return ChatBind(model, tokenizer, model.config)


def save_chatbind(bundle: ChatBind, folder: str | Path, *, overwrite: bool = False) -> None:
    """Writes a model folder, whole or not at all.

    Raises:
        ChatBindError: the folder exists and may not be replaced.
    """
    with (
        quiet_transformers(),
        replace_folder(Path(folder), made_by="save_chatbind", overwrite=overwrite) as temporary,
    ):
        bundle.model.save_pretrained(temporary)
        bundle.tokenizer.save_pretrained(temporary)


@torch.no_grad()
def grow_embeddings(language_model: PreTrainedModel, size: int, *, known: int) -> None:
    """Makes room for new tokens; their rows start as the mean of the known ones.

    Args:
        language_model: changed in place. A vocabulary with spare rows keeps its size.
        size: tokens that the tokenizer has now.
        known: tokens that it had before.
    """
    if size > word_embeddings(language_model).num_embeddings:
        language_model.resize_token_embeddings(size, mean_resizing=False)
    output: Any = language_model.get_output_embeddings()
    for layer in (language_model.get_input_embeddings(), output):
        weight = getattr(layer, "weight", None)
        if weight is not None and known < size:
            # of tied layers the second pass takes the same mean of the same rows
            weight[known:size] = weight[:known].mean(dim=0, dtype=torch.float32).to(weight.dtype)
    bias = getattr(output, "bias", None)
    if bias is not None and known < size:
        bias[known:size] = bias[:known].mean()


def versions() -> dict[str, str]:
    """Versions of what made a model."""
    return {
        "chatbind": chatbind_cli.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def _choices(
    start: ProjectorFile | None, given: Mapping[str, Any], *, where: str
) -> dict[str, Any]:
    """The options of a model: as given, else as the projector file says, else the defaults.

    Raises:
        CheckpointError: an option that shapes the projector contradicts the file.
    """
    chosen = {
        "projector_type": "linear",
        "tokens_per_embedding": 1,
        "projector_layout": "split",
        "use_start_end": True,
        "prompt_style": "v0",
        "normalize_embeddings": True,
    }
    if start is not None:
        told = {name: getattr(start.info, name) for name in chosen}
        chosen.update({name: value for name, value in told.items() if value is not None})
        for name in ("projector_type", "tokens_per_embedding"):
            if given[name] is not None and told[name] not in (None, given[name]):
                raise CheckpointError(
                    f"the projector's {name} is {told[name]}, not {given[name]}", where=where
                )
    chosen.update({name: value for name, value in given.items() if value is not None})
    return chosen


def _is_chatbind(folder: Path) -> bool:
    if is_published(folder):
        return True
    known = folder.is_dir() and (folder / "config.json").is_file()
    return known and read_json(folder / "config.json").get("model_type") == MODEL_TYPE


def _continued(
    opened: ChatBind, given: Mapping[str, Any], encoder: EncoderInfo, *, where: str
) -> ChatBindConfig:
    """The configuration of a model whose training goes on, changed in place.

    Raises:
        CheckpointError: it has another shape than the one asked for, or another encoder.
    """
    config = opened.config
    for name in ("projector_type", "tokens_per_embedding", "use_start_end"):
        if given[name] not in (None, getattr(config, name)):
            raise CheckpointError(
                f"the model's {name} is {getattr(config, name)}, not {given[name]}", where=where
            )
    check_encoder(config, encoder, where=where)
    for name in ("prompt_style", "normalize_embeddings"):
        if given[name] is not None:
            setattr(config, name, given[name])
    config.stage = "finetune"
    config.encoder = encoder.as_record()
    return config


def _language_model_config(path: str | Path) -> PreTrainedConfig:
    """The configuration of a bare language model.

    Raises:
        CheckpointError: it cannot be used, or is that of another model.
    """
    folder = Path(path)
    own = is_published(folder)
    if folder.is_dir() and not own:
        refuse_unapplied(folder)
    config = None if own else open_config(path)
    if config is None or config.model_type == MODEL_TYPE:
        raise CheckpointError(
            "this is a ChatBind model, not a bare language model",
            where=str(path),
            hint="give the language model that it was made from",
        )
    return config


def _with_projector(
    config: ChatBindConfig,
    base: PreTrainedModel,
    start: ProjectorFile | None,
    encoder: EncoderInfo,
    *,
    known: int,
    where: str,
) -> ChatBindForConditionalGeneration:
    """The model around a language model, its projector from a file or fresh."""
    if start is not None:
        check_projector(start, encoder, word_embeddings(base).embedding_dim, where)
    model = ChatBindForConditionalGeneration(config, base)
    model.projector.to(device=base.device, dtype=base.dtype)
    if start is not None:
        load_into(model, start, where)
    else:
        model.projector.reset_parameters(_word_size(base, known))
    return model


def _load_ours(
    folder: Path, options: dict[str, Any]
) -> tuple[ChatBindForConditionalGeneration, PreTrainedTokenizerBase]:
    config = open_config(folder)
    if config.model_type != MODEL_TYPE:
        raise CheckpointError(
            f"a {config.model_type} model, not a ChatBind model",
            where=str(folder),
            hint="finetune makes one from it",
        )
    model = open_model(
        folder,
        ChatBindForConditionalGeneration,
        config=config,
        generation_config=cast(ChatBindConfig, config).generation(saved_end_ids(folder)),
        **options,
    )
    return cast(ChatBindForConditionalGeneration, model), load_tokenizer(folder)


@torch.no_grad()
def _word_size(language_model: PreTrainedModel, known: int) -> float:
    """Root mean square of the entries of the word embeddings: what a soft token should be like."""
    weight = word_embeddings(language_model).weight[:known]
    size = float(torch.linalg.vector_norm(weight, dtype=torch.float32)) / weight.numel() ** 0.5
    return size or 0.02


def _provenance(language_model: str | Path, command: str | None) -> dict[str, Any]:
    base: dict[str, Any] = {"name": str(language_model)}
    if Path(language_model).is_dir():
        base["fingerprint"] = _fingerprint(Path(language_model))
    return {"command": command, "versions": versions(), "language_model": base}


def _fingerprint(folder: Path) -> str:
    """A hash of the ends and sizes of all weights files: quick, and it tells two models apart."""
    digest = hashlib.sha256()
    files = [p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin")]
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_PROBE_BYTES))
            file.seek(max(size - _PROBE_BYTES, 0))
            digest.update(file.read(_PROBE_BYTES))
    return digest.hexdigest()

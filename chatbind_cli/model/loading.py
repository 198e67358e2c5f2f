"""A ChatBind folder in memory, ours or a published one; and a model's projector in and out.

What the fields and tensors of a published folder mean is known to `checkpoints.projector_file`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from chatbind_cli.checkpoints.delta import refuse_unapplied
from chatbind_cli.checkpoints.extract_projector import find_projector
from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.checkpoints.projector_file import (
    ProjectorFile,
    is_published,
    projector_facts,
    projector_from_tensors,
    read_projector,
)
from chatbind_cli.errors import CheckpointError
from chatbind_cli.model.adapters import merge_adapters, read_adapters
from chatbind_cli.model.base import adapted_base, find_base, grow_embeddings, weights_folder
from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration, word_embeddings
from chatbind_cli.model.config import MODEL_TYPE, ChatBindConfig, saved_end_ids
from chatbind_cli.model.pretrained import make_config, open_config, open_model, quiet_transformers
from chatbind_cli.model.tokenizer import (
    load_tokenizer,
    media_rows,
    media_token_ids,
    prepare_tokenizer,
)

PROJECTOR_NAME: Final = "projector.safetensors"

_V0_PADDING = "[PAD]"


@dataclass(frozen=True)
class ChatBind:
    """What belongs together: model, tokenizer with the media tokens, and `model.config`."""

    model: ChatBindForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    config: ChatBindConfig


def is_chatbind(folder: Path) -> bool:
    """Whether a folder's config.json is that of a ChatBind model, ours or published."""
    fields = read_json(folder / "config.json", missing_ok=True)
    return fields.get("model_type") == MODEL_TYPE or is_published(folder)


def load_chatbind(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    base: Path | None = None,
    merge: bool = True,
    device_map: Any = None,
    quantization: Any = None,
) -> ChatBind:
    """Loads a ChatBind model folder, ours or one in the published layout.

    Its weights are as saved if `dtype` is `auto`; attention (see `resolve_attention`) is
    transformers' choice unless given. Of a folder of adapters, `base` is the model that they
    belong to, where it does not lie any more where config.json says; with `merge` they become part
    of its matrices. `device_map` and `quantization` (its `quantization_config`) are for
    transformers.

    Raises:
        CheckpointError: it is no ChatBind model, or its weights are incomplete.
    """
    folder = Path(path)
    refuse_missing(folder)
    refuse_unapplied(folder)
    options = {"dtype": dtype, "attn_implementation": attn_implementation, "device_map": device_map}
    options["quantization_config"] = quantization
    with quiet_transformers():
        if adapted_base(folder) is not None:
            model, tokenizer = _load_adapted(folder, options, base)
            if merge:
                merge_adapters(model.language_model)
                model.config.base_model = None
        else:
            model, tokenizer = _load_whole(weights_folder(folder, base), options)
    check_tokens(model, tokenizer, str(path))
    model.eval()
    return ChatBind(model, tokenizer, model.config)


def refuse_bare(folder: Path) -> None:
    """Refuses a language model by itself.

    Raises:
        CheckpointError: the folder holds no ChatBind model.
    """
    if not is_chatbind(folder):
        kind = read_json(folder / "config.json", missing_ok=True).get("model_type")
        raise CheckpointError(
            f"is no ChatBind model but {str(kind or 'a folder without a config.json')[:60]}",
            where=str(folder),
            hint="a bare one goes with --projector FILE, and `chatbind convert` joins the two",
        )


def refuse_missing(folder: Path) -> None:
    """Refuses what is no model folder.

    Raises:
        CheckpointError: it is not there, or has no config.json.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            "has no config.json" if folder.is_dir() else "no such folder",
            where=str(folder),
            hint="a model comes from `chatbind finetune`, and the published one from `chatbind "
            "download` and `chatbind apply-delta`",
        )


def check_tokens(
    model: ChatBindForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, where: str
) -> None:
    """Refuses a tokenizer that is not the model's.

    Raises:
        CheckpointError: it has other ids for the media tokens, or ids without embeddings.
    """
    check_ids(model, tokenizer, where)
    for name, index in media_token_ids(tokenizer).items():
        own = getattr(model.config, name)
        if own is not None and own != index:
            raise CheckpointError(
                f"config.json says {name} = {own}, the tokenizer says {index}", where=where
            )


def check_ids(model: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
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


def _load_adapted(
    folder: Path, options: dict[str, Any], base: Path | None
) -> tuple[ChatBindForConditionalGeneration, PreTrainedTokenizerBase]:
    """A base model with the projector, the token embeddings and the adapters of a folder."""
    place = find_base(folder, base)
    if adapted_base(place) is not None:
        raise CheckpointError("holds adapters, and adapters of adapters are none", where=str(place))
    config, tokenizer = cast(ChatBindConfig, open_config(folder)), load_tokenizer(folder)
    if is_chatbind(place):
        language_model = _load_whole(place, options)[0].language_model
    else:
        language_model = open_model(place, **options)
        grow_embeddings(language_model, len(tokenizer), known=len(load_tokenizer(place)))
    config.text_config = language_model.config
    model = _joined(config, language_model, read_projector(folder / PROJECTOR_NAME), folder)
    read_adapters(language_model, folder)
    return model, tokenizer


def _load_whole(
    folder: Path, options: dict[str, Any]
) -> tuple[ChatBindForConditionalGeneration, PreTrainedTokenizerBase]:
    if is_published(folder):
        config, tokenizer, projector = read_published(folder)
        text_config = cast(PreTrainedConfig, config.text_config)
        language_model = open_model(folder, config=text_config, **options)
        return _joined(config, language_model, projector, folder), tokenizer
    refuse_bare(folder)
    config = cast(ChatBindConfig, open_config(folder))
    generation = config.generation(saved_end_ids(folder))
    model = open_model(folder, config=config, generation_config=generation, **options)
    return cast(ChatBindForConditionalGeneration, model), load_tokenizer(folder)


def _joined(
    config: ChatBindConfig,
    language_model: PreTrainedModel,
    projector: ProjectorFile,
    folder: Path,
) -> ChatBindForConditionalGeneration:
    """A loaded language model behind a folder's projector, in the same numbers."""
    model = ChatBindForConditionalGeneration(config, language_model)
    model.projector.to(device=language_model.device, dtype=language_model.dtype)
    load_into(model, projector, str(folder))
    return model


def read_published(
    folder: Path,
) -> tuple[ChatBindConfig, PreTrainedTokenizerBase, ProjectorFile]:
    """All of a published folder but its language model: a few megabytes are read.

    The vocabulary tells the version: only v0 has `[PAD]`, and its scripts ask in the style
    `multimodal`; those of v1 in `llava_v1`.

    Raises:
        CheckpointError: there is no projector or no tokenizer.
        WeightsError: a weights file is broken.
    """
    said = read_json(folder / "config.json", missing_ok=True)
    projector, _ = find_projector(folder)
    facts = projector_facts(said, folder / "config.json")
    tokenizer = load_tokenizer(folder)
    prepare_tokenizer(tokenizer, use_start_end=facts["use_start_end"])
    config = ChatBindConfig(
        text_config=make_config(_language_model_fields(said), folder),
        embedding_dim=projector.info.embedding_dim,
        projector_type=projector.info.projector_type,
        prompt_style="multimodal" if _V0_PADDING in tokenizer.get_vocab() else "llava_v1",
        provenance={"published": {k: v for k, v in said.items() if k.startswith("mm_")}},
        **facts | {"encoder": {**facts["encoder"], "sha256": None}},
        **media_token_ids(tokenizer),
    )
    return config, tokenizer, projector


def _language_model_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """What a published config.json says of its language model, as a LLaMA's config.json says it."""
    others = ("architectures", "use_mm_proj", "repeat_feature_dim")
    kept = {
        key: value
        for key, value in fields.items()
        if not key.startswith(("mm_", "tune_", "freeze_")) and key not in others
    }
    return {**kept, "model_type": "llama"}


def projector_of(model: ChatBindForConditionalGeneration) -> ProjectorFile:
    """The projector of a model in memory, with the embeddings of its media tokens."""
    config = model.config
    weight = word_embeddings(model).weight
    words = {name: weight[index] for name, index in media_rows(config).items()}
    tensors = {f"projector.{name}": t for name, t in model.projector.state_dict().items()}
    tensors |= {f"token_embeddings.{name}": row for name, row in words.items()}
    return projector_from_tensors(
        {name: t.cpu() for name, t in tensors.items()}, where="the model", info=vars(config)
    )


@torch.no_grad()
def load_into(
    model: ChatBindForConditionalGeneration, projector: ProjectorFile, where: str
) -> None:
    """Copies a projector's weights and token embeddings into a model.

    Raises:
        CheckpointError: the shapes differ.
    """
    for name, target in model.projector.state_dict().items():
        source = projector.tensors.get(f"projector.{name}")
        if source is None or source.shape != target.shape:
            shape = None if source is None else list(source.shape)
            raise CheckpointError(
                f"the projector's {name} is {shape}, the model wants {list(target.shape)}",
                where=where,
            )
        target.copy_(source)
    weight = word_embeddings(model).weight
    for name, index in media_rows(model.config).items():
        if name in projector.token_embeddings:
            weight[index] = projector.token_embeddings[name].to(weight)

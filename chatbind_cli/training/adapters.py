"""`--lora-r`: how a run has adapters; what they are is in `model.adapters`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from chatbind_cli.errors import CheckpointError
from chatbind_cli.model.adapters import (
    ADAPTER_WEIGHTS,
    ALL_LINEAR,
    adapted_layers,
    adapter_parameters,
    adapters_of,
    add_adapters,
    lora_config,
    write_adapters,
)
from chatbind_cli.model.base import find_base
from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration
from chatbind_cli.model.loading import ChatBind
from chatbind_cli.model.quantization import quantization as packed
from chatbind_cli.training.saved import check_weights
from chatbind_cli.training.settings import TrainingSettings
from chatbind_cli.training.stages import write_stage_1

# those of "QLoRA: Efficient Finetuning of Quantized LLMs" (Dettmers et al., 2023)
_ALPHA, _DROPOUT = 16.0, 0.05


def put_adapters(
    model: ChatBindForConditionalGeneration, settings: TrainingSettings, *, mixed: bool
) -> None:
    """Puts adapters beside the language model's matrices, or goes on with those that it has.

    Args:
        model: changed in place.
        settings: which adapters.
        mixed: whether training runs in mixed precision, which casts what goes into a matrix.

    Raises:
        UsageError: no matrix has a name that the settings say.
        CheckpointError: it has others than the settings say.
    """
    assert settings.lora_r is not None
    language_model = model.language_model
    had = adapters_of(language_model)
    if had is None:
        config = lora_config(
            language_model,
            r=settings.lora_r,
            alpha=_ALPHA if settings.lora_alpha is None else settings.lora_alpha,
            dropout=_DROPOUT if settings.lora_dropout is None else settings.lora_dropout,
            targets=settings.lora_targets or (ALL_LINEAR,),
            dora=bool(settings.lora_dora),
        )
        add_adapters(language_model, config)
    else:
        _check_same(had, settings)
    for _, layer in adapted_layers(language_model):
        # else float32 copies of all inputs are kept for the backward pass: a fifth of its memory
        layer.cast_input_dtype_enabled = not mixed


def _check_same(had: Any, settings: TrainingSettings) -> None:
    """Refuses to go on with other adapters than the settings say.

    Raises:
        CheckpointError: one of their numbers differs.
    """
    asked: dict[str, Any] = {"r": settings.lora_r, "lora_alpha": settings.lora_alpha}
    asked |= {"lora_dropout": settings.lora_dropout, "use_dora": settings.lora_dora}
    asked |= {"target_modules": settings.lora_targets and set(settings.lora_targets)}
    for name, value in asked.items():
        has = getattr(had, name)
        if value not in (None, has):
            raise CheckpointError(
                f"training goes on with its adapters, whose {name} is {has}, not {value}",
                where=str(settings.model),
                hint="`convert --merge` makes a model of it, beside which others can be put",
            )


def write_adapted(bundle: ChatBind, folder: Path, settings: TrainingSettings) -> None:
    """Writes adapters, projector, configuration and tokenizer, and which model they belong to."""
    config = bundle.config
    base, known = settings.model, (config.provenance or {})["language_model"]["fingerprint"]
    if config.base_model is not None:
        base, known = find_base(settings.model), config.base_model["fingerprint"]
    base = base.resolve()
    config.base_model = {"path": str(base), "fingerprint": known}
    # that it was packed for training is not so where it is loaded again
    vars(config.text_config).pop("quantization_config", None)
    write_adapters(bundle.model.language_model, folder, base)
    check_weights(folder / ADAPTER_WEIGHTS, dict(adapter_parameters(bundle.model.language_model)))
    write_stage_1(bundle, folder)


def quantization(settings: TrainingSettings) -> Any:
    """How transformers is to pack a frozen language model; None: not at all.

    Raises:
        UsageError: the settings ask for it, and this machine cannot.
    """
    if not settings.load_in_4bit:
        return None
    compute = torch.float16 if settings.fp16 else torch.bfloat16
    return packed(4, compute, settings.device, "--load-in-4bit")

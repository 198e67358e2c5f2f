"""What `accelerate launch` was configured with, in the words of our own options.

The launcher hands its configuration to workers in the environment, where accelerate would act on
it behind the settings' back.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from chatbind_cli.errors import UsageError
from chatbind_cli.training.settings import TrainingSettings

_OTHERS = ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
# numbers and names are strategies of FSDP's version 1, truth values those of version 2
_STRATEGIES = {
    **dict.fromkeys(("true", "1", "full_shard"), "full_shard"),
    **dict.fromkeys(("false", "2", "shard_grad_op"), "shard_grad_op"),
}
_OPTIONS = {"fsdp_layers": "fsdp-transformer-layer-cls-to-wrap"}


def with_launcher(settings: TrainingSettings) -> TrainingSettings:
    """The settings, with what the launcher was told; which is taken out of the environment.

    Raises:
        UsageError: the launcher was told what is not supported, or what an option contradicts.
    """
    for name in _OTHERS:
        if _is_on(f"ACCELERATE_USE_{name}"):
            raise UsageError(
                f"the launcher's configuration asks for {name}, which is not supported",
                hint='to share a model out over processes: --fsdp "full_shard auto_wrap"',
            )
    told = _sharding() if _is_on("ACCELERATE_USE_FSDP") else {}
    for name in list(os.environ):
        if name == "ACCELERATE_USE_FSDP" or name.startswith("FSDP_"):
            del os.environ[name]
    precision = os.environ.pop("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16", "fp16"):
        raise UsageError(f"the launcher's configuration asks for {precision}")
    if precision != "no":
        told[precision] = True
    for name, value in told.items():
        ours = getattr(settings, name)
        if name == "fsdp":
            ours = " ".join(word for word in ours.split() if word != "auto_wrap")
        if ours not in (None, "", (), value):
            option = f"--{_OPTIONS.get(name, name.replace('_', '-'))}"
            raise UsageError(
                f"{option} is {_shown(ours)}, and the launcher's configuration says "
                f"{_shown(value)}",
                hint="leave one of them out",
            )
    return replace(settings, **told)


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def _sharding() -> dict[str, Any]:
    """The values of our options that FSDP's variables mean."""
    said = {name: os.environ[name] for name in os.environ if name.startswith("FSDP_")}
    newer = said.get("FSDP_VERSION") == "2"
    strategy = said.get("FSDP_RESHARD_AFTER_FORWARD" if newer else "FSDP_SHARDING_STRATEGY", "true")
    word = _STRATEGIES.get(strategy.lower())
    if word is None:
        raise UsageError(f"the launcher's configuration asks for {strategy}, not supported here")
    told: dict[str, Any] = {"fsdp": word}
    if _is_on("FSDP_OFFLOAD_PARAMS"):
        told["fsdp"] += " offload"
    layers = said.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",")
    if any(layers):
        told["fsdp_layers"] = tuple(layer.strip() for layer in layers)
    if _is_on("FSDP_ACTIVATION_CHECKPOINTING"):
        told["gradient_checkpointing"] = True
    return told


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return repr(" ".join(value) if isinstance(value, tuple) else value)

"""Our settings in the words of `transformers.TrainingArguments`.

The one place that knows how those words have changed between versions, and which of them make no
sense on the machine at hand; knows nothing of models and data.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from transformers import TrainingArguments

from chatbind_cli.errors import UsageError
from chatbind_cli.training.settings import TrainingSettings

Note = Callable[[str], None]

_KNOWN = {field.name for field in fields(TrainingArguments)}
# encoding and saving keep the other processes waiting for longer than the default half hour
_TIMEOUT_S = 6 * 3600
_FIRST_WITH_TF32 = 8  # compute capability of Ampere


def training_arguments(
    settings: TrainingSettings, *, world_size: int, note: Note
) -> TrainingArguments:
    """The Trainer's arguments.

    Args:
        settings: what the user asked for.
        world_size: number of processes.
        note: told what has no effect on this machine.

    Raises:
        UsageError: a value that the Trainer does not know.
    """
    _choose_gpu(settings.device)
    gpu = on_gpu(settings)
    values = {
        **_schedule(settings),
        **_keeping(settings, note),
        **_numbers(settings, gpu=gpu, note=note),
        **_sharding(settings, gpu=gpu, world_size=world_size, note=note),
        "output_dir": str(settings.output),
        "seed": settings.seed,
        "data_seed": settings.seed,
        "dataloader_num_workers": settings.dataloader_num_workers,
        "dataloader_pin_memory": gpu,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "disable_tqdm": True,
        "log_level": "error",
        "log_level_replica": "error",
        "ddp_timeout": _TIMEOUT_S,
        "ddp_find_unused_parameters": False,
    }
    try:
        arguments = TrainingArguments(**values)
    except ValueError as error:
        raise UsageError(" ".join(str(error).split())) from error
    # one process works on one GPU, however many it sees: the others are for other processes
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def on_gpu(settings: TrainingSettings) -> bool:
    """Whether the run uses a GPU."""
    return settings.device != "cpu" and torch.cuda.is_available()


def _choose_gpu(device: str) -> None:
    """Leaves only the GPU of that number visible; CUDA must not have started yet.

    Raises:
        UsageError: that is no device we can train on.
    """
    kind, _, number = device.partition(":")
    if kind == "cuda" and number and "RANK" not in os.environ:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        seen = [name for name in seen if name]
        if int(number) >= len(seen or range(torch.cuda.device_count())):
            raise UsageError(f"--device {device}: there is no such GPU")
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[int(number)] if seen else number
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: no GPU that PyTorch can use", hint="--device cpu")


def _schedule(settings: TrainingSettings) -> dict[str, Any]:
    values: dict[str, Any] = {
        "num_train_epochs": settings.num_train_epochs,
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "per_device_eval_batch_size": settings.per_device_eval_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "max_grad_norm": settings.max_grad_norm,
        "average_tokens_across_devices": True,
    }
    if settings.optim is not None:
        values["optim"] = settings.optim
    if settings.warmup_steps is not None:
        values["warmup_steps"] = settings.warmup_steps
    elif "warmup_ratio" in _KNOWN:
        values["warmup_ratio"] = settings.warmup_ratio
    else:
        # since version 5 a fraction of a step means a fraction of all steps; 1 means one step,
        # so that a ratio of 1 has to stay just below it
        values["warmup_steps"] = min(settings.warmup_ratio, 1 - 1e-9)
    return values


def _keeping(settings: TrainingSettings, note: Note) -> dict[str, Any]:
    strategy = "eval_strategy" if "eval_strategy" in _KNOWN else "evaluation_strategy"
    return {
        strategy: settings.eval_strategy,
        "eval_steps": settings.eval_steps,
        "save_strategy": settings.save_strategy,
        "save_steps": settings.save_steps,
        # the run's folder counts the checkpoints, since it knows which are complete
        "save_total_limit": None,
        "logging_strategy": "steps",
        "logging_steps": settings.logging_steps,
        "logging_nan_inf_filter": False,
        "report_to": [name for name in settings.report_to if _installed(name, note)] or "none",
    }


def _installed(tracker: str, note: Note) -> bool:
    if tracker in ("none", "all") or importlib.util.find_spec(tracker) is not None:
        return tracker != "none"
    note(
        f"--report-to {tracker} has no effect: {tracker} is not installed "
        f"(pip install 'chatbind[track]'); the log is on stdout and in log.jsonl"
    )
    return False


def _numbers(settings: TrainingSettings, *, gpu: bool, note: Note) -> dict[str, Any]:
    if settings.tf32 and not gpu:
        note("--tf32 has no effect: it is a mode of NVIDIA GPUs, and none is in use")
    if settings.fp16 and not gpu:
        raise UsageError("--fp16 needs a GPU", hint="use --bf16, or neither")
    bf16 = settings.bf16
    if bf16 is None:
        bf16 = gpu and not settings.fp16 and torch.cuda.is_bf16_supported()
    saving = settings.gradient_checkpointing
    if saving is None:
        saving = gpu
    word = (
        "activation_checkpointing"
        if "activation_checkpointing" in _KNOWN
        else "gradient_checkpointing"
    )
    values: dict[str, Any] = {
        "use_cpu": settings.device == "cpu" or not _any_accelerator(),
        "bf16": bf16,
        "fp16": bool(settings.fp16),
        word: saving,
    }
    if gpu:
        able = torch.cuda.get_device_capability()[0] >= _FIRST_WITH_TF32
        values["tf32"] = able if settings.tf32 is None else settings.tf32
    if saving:
        values[f"{word}_kwargs"] = {"use_reentrant": False}
    return values


def _any_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _sharding(
    settings: TrainingSettings, *, gpu: bool, world_size: int, note: Note
) -> dict[str, Any]:
    words = settings.fsdp.split()
    if not words:
        return {}
    known = ("full_shard", "shard_grad_op", "offload", "auto_wrap")
    unknown = [word for word in words if word not in known]
    if unknown:
        raise UsageError(
            f"--fsdp does not know {unknown[0]!r}", hint=f"it takes {', '.join(known)}"
        )
    if settings.stage == "pretrain" or settings.freeze_backbone:
        note("--fsdp has no effect: the projector alone trains, and it is small")
        return {}
    if world_size == 1:
        note("--fsdp has no effect: there is one process, and so nothing to share out")
        return {}
    if not gpu:
        note("--fsdp has no effect: on CPUs every process holds the whole model")
        return {}
    config: dict[str, Any] = {
        "version": 2,
        "reshard_after_forward": "shard_grad_op" not in words,
        "cpu_offload": "offload" in words,
    }
    if settings.fsdp_layers:
        config["transformer_layer_cls_to_wrap"] = list(settings.fsdp_layers)
    return {"fsdp": True, "fsdp_config": config}

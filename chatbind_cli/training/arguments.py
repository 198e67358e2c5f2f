"""Our settings in the words of `transformers.TrainingArguments`.

The one place that knows which of those words make no sense on the machine at hand.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import fields
from typing import Any

import torch
from transformers import TrainingArguments

from chatbind_cli import worker
from chatbind_cli.console import note
from chatbind_cli.device import resolve_device, resolve_dtype
from chatbind_cli.errors import UsageError, reason
from chatbind_cli.model.attention import resolve_attention
from chatbind_cli.training.hangs import PATIENCE
from chatbind_cli.training.settings import TrainingSettings

_KNOWN = {field.name for field in fields(TrainingArguments)}
# what is said in other words below, by what the machine has and by what version 5 calls it
_TRANSLATED = {"bf16", "tf32", "gradient_checkpointing", "fsdp", "dataloader_num_workers"}
# to the Trainer a step is one batch, see `training.batches`
_TRANSLATED |= {"gradient_accumulation_steps"}
_MOST_WORKERS = 4
_FIRST_WITH_TF32 = 8  # compute capability of Ampere


def training_arguments(settings: TrainingSettings) -> TrainingArguments:
    """The Trainer's arguments; of what has no effect on this machine a note is made.

    Raises:
        UsageError: a value that the Trainer does not know.
    """
    _choose_gpu(settings.device)
    gpu = on_gpu(settings)
    shared = _KNOWN.intersection(f.name for f in fields(settings)) - _TRANSLATED
    values = {n: getattr(settings, n) for n in shared if getattr(settings, n) is not None}
    if settings.warmup_steps is None:
        # a fraction of a step means a fraction of all steps; 1 means one step, so that a ratio of
        # 1 has to stay just below it
        values["warmup_steps"] = min(settings.warmup_ratio, 1 - 1e-9)
    if settings.max_steps == 0:
        values["num_train_epochs"] = 0  # by 0 steps the library understands that none are set
    values |= {
        **_numbers(settings, gpu=gpu),
        "output_dir": str(settings.output),
        "data_seed": settings.seed,
        "average_tokens_across_devices": True,
        "dataloader_pin_memory": gpu,
        "dataloader_num_workers": _workers(settings, gpu=gpu),
        "remove_unused_columns": False,
        "label_names": ["labels"],
        # the run's folder counts the checkpoints, since it knows which are complete
        "save_total_limit": None,
        "logging_strategy": "steps",
        "logging_nan_inf_filter": False,
        "report_to": [name for name in settings.report_to if _installed(name)] or "none",
        "disable_tqdm": True,
        "log_level": "error",
        "log_level_replica": "error",
        "ddp_timeout": int(PATIENCE.total_seconds()),
        "ddp_find_unused_parameters": False,
    }
    try:
        arguments = TrainingArguments(**values)
    except ValueError as error:
        raise UsageError(reason(error)) from error
    # one process works on one GPU, however many it sees: the others are for other processes
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def on_gpu(settings: TrainingSettings) -> bool:
    """Whether the run uses a GPU."""
    return settings.device != "cpu" and torch.cuda.is_available()


def _workers(settings: TrainingSettings, *, gpu: bool) -> int:
    """Processes that make batches ahead: unless told, none where the cores compute as well."""
    if settings.dataloader_num_workers is not None:
        return settings.dataloader_num_workers
    return min(_MOST_WORKERS, worker.cpus() - 1) if gpu else 0


def weights_dtype(settings: TrainingSettings) -> torch.dtype:
    """How the language model is held: trained weights in float32, frozen ones as small as told."""
    if settings.dtype != "auto":
        return resolve_dtype(settings.dtype, torch.device("cpu"))
    half = settings.bf16 or (settings.bf16 is None and on_gpu(settings))
    small = half and not settings.fp16 and not settings.matrices_train
    return torch.bfloat16 if small else torch.float32


def saved_dtype(
    settings: TrainingSettings, trained: torch.dtype, arguments: TrainingArguments
) -> torch.dtype:
    """The numbers of the model that a run leaves, given those of its weights in training."""
    if settings.save_dtype != "auto":
        return resolve_dtype(settings.save_dtype, torch.device("cpu"))
    return torch.bfloat16 if arguments.bf16 else trained


def attention(settings: TrainingSettings, arguments: TrainingArguments) -> str:
    """The attention kernels of a run; under mixed precision they see the smaller numbers.

    Raises:
        UsageError: those that were asked for cannot work here.
    """
    computing = weights_dtype(settings)
    if arguments.bf16 or arguments.fp16:
        computing = torch.bfloat16 if arguments.bf16 else torch.float16
    return resolve_attention(settings.attn_implementation, arguments.device, computing)


def _choose_gpu(name: str) -> None:
    """Leaves only the GPU of that number visible; CUDA must not have started yet.

    Raises:
        UsageError: there is no such device.
    """
    device = resolve_device(name)
    if device.type == "cuda" and ":" in name and "RANK" not in os.environ:
        seen = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word]
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[device.index] if seen else str(device.index)


def _installed(tracker: str) -> bool:
    if tracker in ("none", "all") or importlib.util.find_spec(tracker) is not None:
        return tracker != "none"
    note(
        f"--report-to {tracker} has no effect: {tracker} is not installed "
        f"(pip install 'chatbind[track]'); the log is on stdout and in log.jsonl"
    )
    return False


def _numbers(settings: TrainingSettings, *, gpu: bool) -> dict[str, Any]:
    if settings.tf32 and not gpu:
        note("--tf32 has no effect: it is a mode of NVIDIA GPUs, and none is in use")
    if settings.fp16 and not gpu:
        raise UsageError("--fp16 needs a GPU", hint="use --bf16, or neither")
    bf16 = settings.bf16
    if bf16 is None:
        bf16 = gpu and not settings.fp16 and torch.cuda.is_bf16_supported()
    saving = settings.gradient_checkpointing
    if saving is None:  # what is shared out cannot be tried, see `checkpointing.Trial`
        saving = gpu and bool(settings.fsdp)
    values: dict[str, Any] = {
        "use_cpu": not gpu and (settings.device == "cpu" or not torch.backends.mps.is_available()),
        "bf16": bf16,
    }
    if gpu:
        able = torch.cuda.get_device_capability()[0] >= _FIRST_WITH_TF32
        values["tf32"] = able if settings.tf32 is None else settings.tf32
    if saving:
        newer = "activation_checkpointing" in _KNOWN
        word = "activation_checkpointing" if newer else "gradient_checkpointing"
        values |= {word: True, f"{word}_kwargs": {"use_reentrant": False}}
    return values

"""`pretrain` and `finetune`: their options put together, and what is done with them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from chatbind_cli import hardware, launch, stopping
from chatbind_cli.plan import Dispatch

from ._options import (
    F,
    attention_option,
    device_options,
    dispatch_options,
    dispatched,
    seed_option,
    stack,
)
from ._training_options import (
    compute_options,
    input_options,
    model_options,
    output_options,
    schedule_options,
    seed_only_options,
)

if TYPE_CHECKING:
    from chatbind_cli.training.inputs import Inputs
    from chatbind_cli.training.settings import Stage, TrainingSettings

# What people set: the rest is shown by --help-all.
_SHOWN = {"model", "data", "media_root", "encoder", "store", "projector", "prompt_style"}
_SHOWN |= {"num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size"}
_SHOWN |= {"global_batch_size", "seed", "device", "bf16", "output"}
_SHOWN |= {"overwrite", "num_processes", "dry_run", "lora_r"}


def training_options(defaults: Mapping[str, Any], *own: Callable[[Any], Any]) -> Callable[[F], F]:
    """All options of a stage, by the names of `TrainingSettings`, and `plan`.

    Args:
        defaults: the published hyper-parameters of the stage.
        own: options that only this stage has.
    """
    options = stack(
        input_options,
        *own,
        model_options,
        schedule_options,
        seed_option,
        device_options,
        attention_option,
        compute_options,
        output_options,
        dispatch_options,
        seed_only_options,
    )

    def wrap(function: F) -> F:
        wrapped = options(function)
        for param in vars(wrapped)["__click_params__"]:
            param.advanced = param.name not in _SHOWN
            if param.name in defaults:
                param.default, param.show_default = defaults[param.name], True
        return wrapped

    return wrap


def style_name(word: str | None) -> str | None:
    """The prompt style that a word of `--prompt-style` means; `--version`'s are short for them."""
    from chatbind_cli.model.prompts import STYLE_BY_VERSION, get_style  # noqa: PLC0415

    return word and get_style(STYLE_BY_VERSION.get(word, word)).name


def run_stage(stage: Stage, plan: Dispatch, values: dict[str, Any]) -> None:
    """Checks the inputs, then trains in this process or in workers.

    Args:
        stage: what to train.
        plan: where.
        values: of the options.
    """
    from chatbind_cli.artifacts import resolve_artifact  # noqa: PLC0415  help need not pay
    from chatbind_cli.training.data_files import DataFile  # noqa: PLC0415
    from chatbind_cli.training.longest import longest_sample  # noqa: PLC0415
    from chatbind_cli.training.settings import TrainingSettings  # noqa: PLC0415

    values["encoders"], values["stores"] = values.pop("encoder"), values.pop("store")
    values["data"] = tuple(map(DataFile.parse, values["data"]))
    values["prompt_style"] = style_name(values["prompt_style"])
    values["model_max_length"] = longest_sample(values["model"], values["model_max_length"])
    for name in ("report_to", "fsdp_layers", "lora_targets"):
        values[name] = tuple(w for v in values.get(name, ()) for w in v.split(",") if w)
    values["lora_targets"] = values["lora_targets"] or None
    words: list[str] = []
    if values.get("projector") is not None:
        values["projector"] = resolve_artifact(values["projector"], {"projector"})
        # workers cannot read the projector's record from this process's stdin
        words = ["--projector", str(values["projector"])]
    command = tuple(click.get_current_context().obj or ())
    settings = TrainingSettings(stage=stage, command=command, **values)
    if plan.dry_run:
        dispatched(plan, words)
        return
    with launch.met(plan) as here:
        _check_and_train(settings, here, words)


def _check_and_train(settings: TrainingSettings, plan: Dispatch, words: list[str]) -> None:
    from chatbind_cli.training.inputs import (  # noqa: PLC0415
        parent_tells,
        telling_workers,
        told_by_parent,
    )

    # SIGUSR1 foretells the end of a job: training asks for it, and what comes before goes on
    with stopping.noting(signal.SIGUSR1):
        if parent_tells():
            from chatbind_cli.training.run import train  # noqa: PLC0415  while the parent looks

            train(settings, told_by_parent())
            return
        with telling_workers() as tell:
            if dispatched(plan, words, lambda folder: tell(_looked_at(settings, plan), folder)):
                return
        inputs = _looked_at(settings, plan)
        from chatbind_cli.training.run import train  # noqa: PLC0415

        train(settings, inputs)


def _looked_at(settings: TrainingSettings, plan: Dispatch) -> Inputs:
    from chatbind_cli.data.checked import checked_ahead  # noqa: PLC0415
    from chatbind_cli.training.inputs import check_inputs  # noqa: PLC0415

    with checked_ahead([file.path for file in settings.data]) as takes_time:
        if takes_time:
            import_module("chatbind_cli.training.run")  # so do the libraries
        inputs = check_inputs(settings)
    if "RANK" in os.environ:  # each of several processes would
        return inputs
    from chatbind_cli.training.preflight import preflight  # noqa: PLC0415

    gpus = 0 if plan.device == "cpu" else hardware.gpu_count()
    return preflight(settings, inputs, gpus=gpus)

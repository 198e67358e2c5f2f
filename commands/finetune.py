"""`chatbind finetune`: stage 2, projector and language model."""

from __future__ import annotations

from typing import Any

import click

from chatbind_cli.plan import Dispatch

from . import _base
from ._base import BoolOption, ListOption, in_group, is_given
from ._training import run_stage, training_options

# the published hyper-parameters: 4 GPUs x 4 samples x 2 passes = 32 samples a step
_DEFAULTS = {
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "group_by_length": False,
    "packing": True,
    "learning_rate": 2e-5,
    "save_steps": 5000,
    "save_total_limit": 3,
}

# the published rate would hardly move adapters, which begin at zero
_ADAPTERS_RATE = 2e-4


@_base.command(
    "finetune",
    examples=[
        "chatbind finetune -m llama --projector stage1/projector.safetensors --encoder "
        "imagebind --data train/instructions.json --media-root media -o stage2",
        "chatbind extract-projector stage1 -o p.safetensors | chatbind finetune -m llama "
        "--projector - --data train/instructions.json --media-root media "
        "-o stage2-short --max-steps 20",
    ],
)
@training_options(
    _DEFAULTS,
    in_group("Model")(
        "--projector",
        "--pretrain-mm-mlp-adapter",
        "projector",
        metavar="FILE",
        help="Projector of stage 1, .safetensors or .bin; -: the one that the stage before in a "
        "pipe has made.",
    ),
    in_group("Model", BoolOption)(
        "--freeze-backbone",
        "--tune-mm-mlp-adapter",
        "freeze_backbone",
        default=False,
        help="Train the projector alone, and leave the language model as it is.",
    ),
    in_group("Output")(
        "--save-dtype",
        type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
        default="auto",
        help="Numbers of the model that is made; auto: bfloat16 after training with --bf16, which "
        "rounds the trained weights, else as trained.",
    ),
    in_group("Model")(
        "--lora-r",
        metavar="RANK",
        type=click.IntRange(min=1),
        help="Train adapters (LoRA) of this rank beside the language model's matrices, and leave "
        f"these as they are; --learning-rate is {_ADAPTERS_RATE:g} then, unless given.",
    ),
    in_group("Model")(
        "--lora-alpha",
        type=click.FloatRange(min=0, min_open=True),
        help="What adapters add is multiplied by alpha / rank; default: 16.",
    ),
    in_group("Model")(
        "--lora-dropout",
        type=click.FloatRange(min=0, max=1, max_open=True),
        help="Share of an adapter's inputs that training leaves out; default: 0.05.",
    ),
    in_group("Model", ListOption)(
        "--lora-targets",
        metavar="NAME...",
        help="Matrices that get adapters, by the last part of their names (q_proj v_proj); "
        "default: all-linear, all but the output layer.",
    ),
    in_group("Model", BoolOption)(
        "--lora-dora",
        help="Train the lengths of the matrices' rows, too (DoRA).",
    ),
    in_group("Model", BoolOption)(
        "--load-in-4bit",
        help="Hold the language model in 4 bits a number (QLoRA); needs --lora-r, an NVIDIA GPU "
        "and bitsandbytes. It has never been run.",
    ),
)
def command(plan: Dispatch, **values: Any) -> None:
    """Stage 2: fit projector and language model on instructions.

    Makes a ChatBind model folder that `ask`, `vqa` and `from_pretrained` load; with --lora-r it
    holds projector and adapters only. Log records go to stdout as the work goes on; the last
    record names the model.
    """
    if values["lora_r"] is not None and not is_given("learning_rate"):
        values["learning_rate"] = _ADAPTERS_RATE
    run_stage("finetune", plan, values)

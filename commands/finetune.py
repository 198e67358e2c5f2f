"""`chatbind finetune`: stage 2, projector and language model."""

from __future__ import annotations

from typing import Any

from chatbind_cli import launch

from . import _base
from ._base import BoolOption, in_group
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


@_base.command(
    "finetune",
    examples=[
        "chatbind finetune -m llama --projector stage1/projector.safetensors --encoder "
        "imagebind --data train/instructions.json --media-root media -o stage2",
        "chatbind extract-projector stage1 -o p.safetensors | chatbind finetune -m llama "
        "--projector - --encoder imagebind --data train/instructions.json --media-root media "
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
)
def command(plan: launch.Dispatch, **values: Any) -> None:
    """Stage 2: fit projector and language model on instructions.

    Makes a ChatBind model folder that `ask`, `vqa` and `from_pretrained` load. Log records go to
    stdout as the work goes on; the last record names the model.
    """
    run_stage("finetune", plan, values)

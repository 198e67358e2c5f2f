"""`chatbind pretrain`: stage 1, the projector alone."""

from __future__ import annotations

from typing import Any

from chatbind_cli.plan import Dispatch

from . import _base
from ._options import without_effect
from ._training import run_stage, training_options

# the published hyper-parameters: 4 GPUs x 16 samples x 2 passes = 128 samples a step
_DEFAULTS = {
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "group_by_length": True,
    "packing": False,
    "learning_rate": 2e-3,
    "save_steps": 2400,
    "save_total_limit": 1,
}


@_base.command(
    "pretrain",
    examples=[
        "chatbind pretrain -m llama --encoder imagebind --data train/captions.json "
        "--media-root media -o first",
        "chatbind pretrain -m llama --encoder imagebind --data train/captions.json "
        "--media-root media -o short --max-steps 20 | tail -n 1",
    ],
)
@training_options(
    _DEFAULTS,
    without_effect("--tune-mm-mlp-adapter", because="stage 1 always trains the projector alone"),
)
def command(plan: Dispatch, **values: Any) -> None:
    """Stage 1: fit the projector on captions.

    Trains the projector and the embeddings of <im_start> and <im_end>; the language model and the
    encoder stay as they are. Media are encoded once, before the first step. Log records go to
    stdout as the work goes on; the last record names the checkpoint.
    """
    run_stage("pretrain", plan, values)

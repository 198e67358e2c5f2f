"""What `pretrain` and `finetune` share: their options, and what is done with them.

The names are those of `transformers.TrainingArguments` and of the original training scripts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chatbind_cli import launch

from ._base import BoolOption, ListOption, in_group
from ._options import (
    FILE,
    FOLDER,
    NEW_FILE,
    NEW_FOLDER,
    F,
    attention_option,
    device_options,
    dispatch_options,
    dispatched,
    media_root_options,
    overwrite_option,
    seed_option,
    stack,
    without_effect,
)

if TYPE_CHECKING:
    from chatbind_cli.training.settings import Stage

_PATH = click.Path(path_type=Path)
_WHOLE, _POSITIVE = click.IntRange(min=0), click.IntRange(min=1)
_SHARE, _ABOVE_0 = click.FloatRange(min=0), click.FloatRange(min=0, min_open=True)

# What people set: the rest is shown by --help-all.
_SHOWN = {"model", "data", "media_root", "encoder", "store", "projector", "prompt_style"}
_SHOWN |= {"num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size"}
_SHOWN |= {"gradient_accumulation_steps", "seed", "device", "bf16", "output", "save_steps"}
_SHOWN |= {"overwrite", "num_processes", "dry_run"}

_input, _media, _model = in_group("Input"), in_group("Media"), in_group("Model")
_training, _output = in_group("Training"), in_group("Output")
_compute, _switch = in_group("Compute"), in_group("Compute", BoolOption)


_input_options = stack(
    _input(
        "-m",
        "--model",
        "--model-name-or-path",
        "model",
        metavar="DIR",
        type=_PATH,
        required=True,
        help="Language model: a Hugging Face folder of a causal LM.",
    ),
    _input(
        "--data",
        "--data-path",
        "data",
        metavar="FILE",
        type=_PATH,
        required=True,
        help="Conversations to train on: LLaVA's JSON array, or JSONL; text-only ones too.",
    ),
    _input(
        "--eval-data",
        metavar="FILE",
        type=FILE,
        help="Held-out conversations, for --evaluation-strategy.",
    ),
    media_root_options,
    _media(
        "--encoder",
        metavar="PATH",
        type=_PATH,
        help="ImageBind's weights, a file or folder; default: checkpoints/imagebind, "
        "then .checkpoints/imagebind_huge.pth.",
    ),
    _media(
        "--store",
        metavar="DIR",
        type=FOLDER,
        help="Embeddings that `chatbind encode --store` or an earlier run (its folder "
        "`embeddings`) made; then media and encoder are not read.",
    ),
    _media(
        "--on-error",
        type=click.Choice(["fail", "skip"]),
        default="fail",
        help="Records or media that cannot be used: name them and stop before training, "
        "or train without them.",
    ),
)


_model_options = stack(
    _model(
        "--projector-type",
        "--mm-projector-type",
        "projector_type",
        type=click.Choice(["linear", "mlp2x_gelu"]),
        metavar="[linear|mlp2x_gelu]",
        help="Form of the projector; default: linear, or as the projector file says.",
    ),
    _model(
        "--tokens-per-embedding",
        type=_POSITIVE,
        help="Soft tokens that one embedding becomes; default: 1, or as the projector file says.",
    ),
    _model(
        "--mm-use-im-start-end",
        "use_start_end",
        cls=BoolOption,
        help="Put <im_start> and <im_end> around soft tokens; default: yes.",
    ),
    _model(
        "--prompt-style",
        "--version",
        "prompt_style",
        metavar="NAME",
        help="v0, v1 (= vicuna_v1_1), multimodal, llava_v1, mpt_multimodal, chat (the tokenizer's "
        "own template); default: v0, or as the projector file says.",
    ),
    _model(
        "--model-max-length",
        type=click.IntRange(min=8),
        default=2048,
        help="Longer samples are cut there, in tokens.",
    ),
)


def _number(name: str, kind: click.ParamType[Any], text: str, default: Any = None) -> Any:
    return _training(name, type=kind, default=default, help=text)


_schedule_options = stack(
    _number("--num-train-epochs", _SHARE, "Passes over the data."),
    _number("--max-steps", click.INT, "Steps in all, in place of epochs; -1: none set.", -1),
    _number("--per-device-train-batch-size", _POSITIVE, "Samples a process and forward pass."),
    _number("--gradient-accumulation-steps", _POSITIVE, "Forward passes a step."),
    _number("--learning-rate", _SHARE, "Highest learning rate."),
    _number("--weight-decay", _SHARE, "AdamW's weight decay.", 0.0),
    _number("--warmup-ratio", click.FloatRange(0, 1), "Share of steps that warm up.", 0.03),
    _number("--warmup-steps", _WHOLE, "The same as a number of steps; wins over the ratio."),
    _training(
        "--lr-scheduler-type",
        default="cosine",
        help="cosine, linear, constant, constant_with_warmup, ... (transformers' names).",
    ),
    _training("--optim", help="Another optimizer, by transformers' name."),
    _number("--max-grad-norm", _SHARE, "Gradients are clipped to it; 0: not.", 1.0),
    _training(
        "--evaluation-strategy",
        "--eval-strategy",
        "eval_strategy",
        type=click.Choice(["no", "steps", "epoch"]),
        default="no",
        help="When to measure the loss on --eval-data.",
    ),
    _number("--eval-steps", _SHARE, "Steps between; default: --logging-steps."),
    _number("--per-device-eval-batch-size", _POSITIVE, "Samples a process then.", 4),
)

_compute_options = stack(
    _switch("--bf16", help="Mixed precision with bfloat16; default: on a GPU that has it."),
    _switch("--fp16", help="Mixed precision with float16."),
    _switch("--tf32", help="TF32 matrix products; default: on a GPU that has them."),
    _switch(
        "--gradient-checkpointing",
        "--activation-checkpointing",
        "gradient_checkpointing",
        help="Compute activations twice to save memory; default: on a GPU.",
    ),
    _compute(
        "--fsdp",
        default="",
        show_default=False,
        metavar="WORDS",
        help='Share the model out over processes: "full_shard auto_wrap", "shard_grad_op", and '
        '"offload" for parameters in main memory.',
    ),
    _compute(
        "--fsdp-transformer-layer-cls-to-wrap",
        "fsdp_layers",
        cls=ListOption,
        metavar="CLASS...",
        help="Layers that are shared out one by one; default: the language model's own.",
    ),
    _compute(
        "--dataloader-num-workers",
        type=_WHOLE,
        default=0,
        help="Processes that make batches ahead.",
    ),
)

_output_options = stack(
    _output(
        "-o",
        "--output",
        "--output-dir",
        "output",
        metavar="DIR",
        type=NEW_FOLDER,
        required=True,
        help="Folder for the result, the checkpoints and the log. Running the same command "
        "again goes on from the last checkpoint.",
    ),
    _output(
        "--save-strategy",
        type=click.Choice(["no", "steps", "epoch"]),
        default="steps",
        help="When to write checkpoints.",
    ),
    _output(
        "--save-steps",
        type=_ABOVE_0,
        help="Steps between checkpoints; below 1: a share of all steps.",
    ),
    _output("--save-total-limit", type=_POSITIVE, help="Checkpoints that are kept."),
    overwrite_option,
    _output("--logging-steps", type=_ABOVE_0, default=1, help="Steps between log records."),
    _output(
        "--report-to",
        cls=ListOption,
        metavar="NAME...",
        help="Also log to wandb, tensorboard or trackio; none.",
    ),
    _output(
        "--plot",
        metavar="FILE",
        type=NEW_FILE,
        help="One more picture of the loss: .png, .svg or .pdf.",
    ),
)

_seed_only_options = stack(
    without_effect("--vision-tower", because="the encoder is ImageBind, see --encoder"),
    without_effect(
        "--mm-vision-select-layer",
        because="ImageBind gives one embedding, not a layer's patches",
        needs_value=True,
    ),
    without_effect("--lazy-preprocess", because="samples are always made when they are needed"),
)


def training_options(defaults: Mapping[str, Any], *own: Callable[[Any], Any]) -> Callable[[F], F]:
    """All options of a stage, by the names of `TrainingSettings`, and `plan`.

    Args:
        defaults: the published hyper-parameters of the stage.
        own: options that only this stage has.
    """
    options = stack(
        _input_options,
        *own,
        _model_options,
        _schedule_options,
        seed_option,
        device_options,
        attention_option,
        _compute_options,
        _output_options,
        dispatch_options,
        _seed_only_options,
    )

    def wrap(function: F) -> F:
        wrapped = options(function)
        for param in vars(wrapped)["__click_params__"]:
            param.advanced = param.name not in _SHOWN
            if param.name in defaults:
                param.default, param.show_default = defaults[param.name], True
        return wrapped

    return wrap


def run_stage(stage: Stage, plan: launch.Dispatch, values: dict[str, Any]) -> None:
    """Checks the inputs, then trains in this process or in workers.

    Args:
        stage: what to train.
        plan: where.
        values: of the options.
    """
    from chatbind_cli.artifacts import resolve_artifact  # noqa: PLC0415  help need not pay
    from chatbind_cli.model.prompts import STYLE_BY_VERSION, get_style  # noqa: PLC0415
    from chatbind_cli.training.settings import TrainingSettings  # noqa: PLC0415

    style = values.pop("prompt_style")
    if style is not None:  # `--version`'s values are short for styles
        values["prompt_style"] = get_style(STYLE_BY_VERSION.get(style, style)).name
    for name in ("report_to", "fsdp_layers"):
        values[name] = tuple(w for v in values[name] for w in v.split(",") if w)
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
    from chatbind_cli.training.inputs import check_inputs, told_to_workers  # noqa: PLC0415

    inputs = check_inputs(settings)
    with told_to_workers(inputs):
        if dispatched(plan, words):
            return
    from chatbind_cli.training.run import train  # noqa: PLC0415

    train(settings, inputs)

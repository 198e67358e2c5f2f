"""The options that `pretrain` and `finetune` share, packed into one settings object.

The names are those of `transformers.TrainingArguments` and of the original training scripts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chatbind_cli import launch

from ._base import BoolOption, GroupedOption, ListOption
from ._options import (
    F,
    dispatched,
    media_root_options,
    overwrite_option,
    seed_option,
    stack,
    without_effect,
)

if TYPE_CHECKING:
    from chatbind_cli.training.settings import TrainingSettings

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_DIR = click.Path(exists=True, file_okay=False, path_type=Path)
_PATH = click.Path(path_type=Path)


def _option(
    *names: str, group: str, cls: type[GroupedOption] = GroupedOption, **more: Any
) -> Callable[[Any], Any]:
    return click.option(*names, cls=cls, group=group, **more)


def input_options(data_help: str) -> Callable[[F], F]:
    """What a stage reads: language model, conversations, media or their embeddings."""
    return stack(
        _option(
            "-m",
            "--model",
            "--model-name-or-path",
            "model",
            group="Input",
            metavar="DIR",
            type=_PATH,
            required=True,
            help="Language model: a Hugging Face folder of a causal LM.",
        ),
        _option(
            "--data",
            "--data-path",
            "data",
            group="Input",
            metavar="FILE",
            type=_PATH,
            required=True,
            help=data_help,
        ),
        _option(
            "--eval-data",
            group="Input",
            metavar="FILE",
            type=_FILE,
            help="Held-out conversations, for --evaluation-strategy.",
        ),
        media_root_options,
        _option(
            "--encoder",
            group="Media",
            metavar="PATH",
            type=_PATH,
            help="ImageBind's weights, a file or folder; default: checkpoints/imagebind, "
            "then .checkpoints/imagebind_huge.pth.",
        ),
        _option(
            "--store",
            group="Media",
            metavar="DIR",
            type=_DIR,
            help="Embeddings that `chatbind encode --store` or an earlier run (its folder "
            "`embeddings`) made; then media and encoder are not read.",
        ),
        _option(
            "--on-error",
            group="Media",
            type=click.Choice(["fail", "skip"]),
            default="fail",
            help="Records or media that cannot be used: name them and stop before training, "
            "or train without them.",
        ),
    )


model_options = stack(
    _option(
        "--projector-type",
        "--mm-projector-type",
        "projector_type",
        group="Model",
        type=click.Choice(["linear", "mlp2x_gelu"]),
        metavar="[linear|mlp2x_gelu]",
        help="Form of the projector; default: linear, or as the projector file says.",
    ),
    _option(
        "--tokens-per-embedding",
        group="Model",
        type=click.IntRange(min=1),
        help="Soft tokens that one embedding becomes; default: 1, or as the projector file says.",
    ),
    _option(
        "--mm-use-im-start-end",
        "use_start_end",
        cls=BoolOption,
        group="Model",
        help="Put <im_start> and <im_end> around soft tokens; default: yes.",
    ),
    _option(
        "--prompt-style",
        "--version",
        "prompt_style",
        group="Model",
        metavar="NAME",
        help="v0, v1 (= vicuna_v1_1), multimodal, llava_v1, mpt_multimodal, chat (the tokenizer's "
        "own template); default: v0, or as the projector file says.",
    ),
    _option(
        "--model-max-length",
        group="Model",
        type=click.IntRange(min=8),
        default=2048,
        help="Longer samples are cut there, in tokens.",
    ),
)


def schedule_options(defaults: Mapping[str, Any]) -> Callable[[F], F]:
    """Batches, steps and learning rates; the defaults are the published ones of a stage."""

    def number(
        name: str, kind: click.ParamType[Any], text: str, default: Any = None
    ) -> Callable[[Any], Any]:
        key = name.removeprefix("--").replace("-", "_")
        return _option(
            name, group="Training", type=kind, default=defaults.get(key, default), help=text
        )

    whole, positive = click.IntRange(min=0), click.IntRange(min=1)
    fraction = click.FloatRange(min=0)
    return stack(
        number("--num-train-epochs", fraction, "Passes over the data."),
        number("--max-steps", click.INT, "Steps in all, in place of epochs; -1: none set.", -1),
        number("--per-device-train-batch-size", positive, "Samples a process and forward pass."),
        number("--gradient-accumulation-steps", positive, "Forward passes a step."),
        number("--learning-rate", fraction, "Highest learning rate."),
        number("--weight-decay", fraction, "AdamW's weight decay.", 0.0),
        number("--warmup-ratio", click.FloatRange(0, 1), "Share of steps that warm up.", 0.03),
        number("--warmup-steps", whole, "The same as a number of steps; wins over the ratio."),
        _option(
            "--lr-scheduler-type",
            group="Training",
            default="cosine",
            help="cosine, linear, constant, constant_with_warmup, ... (transformers' names).",
        ),
        _option("--optim", group="Training", help="Another optimizer, by transformers' name."),
        number("--max-grad-norm", fraction, "Gradients are clipped to it; 0: not.", 1.0),
        seed_option,
        _option(
            "--evaluation-strategy",
            "--eval-strategy",
            "eval_strategy",
            group="Training",
            type=click.Choice(["no", "steps", "epoch"]),
            default="no",
            help="When to measure the loss on --eval-data.",
        ),
        number("--eval-steps", fraction, "Steps between; default: --logging-steps."),
        number("--per-device-eval-batch-size", positive, "Samples a process then.", 4),
    )


compute_options = stack(
    _option(
        "--bf16",
        cls=BoolOption,
        group="Compute",
        help="Mixed precision with bfloat16; default: on a GPU that has it.",
    ),
    _option("--fp16", cls=BoolOption, group="Compute", help="Mixed precision with float16."),
    _option(
        "--tf32",
        cls=BoolOption,
        group="Compute",
        help="TF32 matrix products; default: on a GPU that has them.",
    ),
    _option(
        "--gradient-checkpointing",
        "--activation-checkpointing",
        "gradient_checkpointing",
        cls=BoolOption,
        group="Compute",
        help="Compute activations twice to save memory; default: on a GPU.",
    ),
    _option(
        "--fsdp",
        group="Compute",
        metavar="WORDS",
        help='Share the model out over processes: "full_shard auto_wrap", "shard_grad_op", and '
        '"offload" for parameters in main memory.',
    ),
    _option(
        "--fsdp-transformer-layer-cls-to-wrap",
        "fsdp_layers",
        cls=ListOption,
        group="Compute",
        metavar="CLASS...",
        help="Layers that are shared out one by one; default: the language model's own.",
    ),
    _option(
        "--dataloader-num-workers",
        group="Compute",
        type=click.IntRange(min=0),
        default=0,
        help="Processes that make batches ahead.",
    ),
)


_log_options = stack(
    _option(
        "--logging-steps",
        group="Output",
        type=click.FloatRange(min=0, min_open=True),
        default=1,
        help="Steps between log records.",
    ),
    _option(
        "--report-to",
        cls=ListOption,
        group="Output",
        metavar="NAME...",
        help="Also log to wandb, tensorboard or trackio; none.",
    ),
    _option(
        "--plot",
        group="Output",
        metavar="FILE",
        type=click.Path(dir_okay=False, path_type=Path),
        help="One more picture of the loss: .png, .svg or .pdf.",
    ),
)


def result_options(defaults: Mapping[str, Any]) -> Callable[[F], F]:
    """What is written where, and how often."""
    return stack(
        _option(
            "-o",
            "--output",
            "--output-dir",
            "output",
            group="Output",
            metavar="DIR",
            type=click.Path(file_okay=False, path_type=Path),
            required=True,
            help="Folder for the result, the checkpoints and the log. Running the same command "
            "again goes on from the last checkpoint.",
        ),
        _option(
            "--save-strategy",
            group="Output",
            type=click.Choice(["no", "steps", "epoch"]),
            default="steps",
            help="When to write checkpoints.",
        ),
        _option(
            "--save-steps",
            group="Output",
            type=click.FloatRange(min=0, min_open=True),
            default=defaults["save_steps"],
            help="Steps between checkpoints; below 1: a share of all steps.",
        ),
        _option(
            "--save-total-limit",
            group="Output",
            type=click.IntRange(min=1),
            default=defaults["save_total_limit"],
            help="Checkpoints that are kept.",
        ),
        overwrite_option,
        _log_options,
    )


seed_only_options = stack(
    without_effect("--vision-tower", because="the encoder is ImageBind, see --encoder"),
    without_effect(
        "--mm-vision-select-layer",
        because="ImageBind gives one embedding, not a layer's patches",
        needs_value=True,
    ),
    without_effect("--lazy-preprocess", because="samples are always made when they are needed"),
)


def settings_option(stage: str) -> Callable[[F], F]:
    """Packs the options into a `TrainingSettings`, handed to the function as `settings`."""

    def wrap(function: F) -> F:
        @wraps(function)
        def packed(*, plan: Any, **values: Any) -> Any:
            from chatbind_cli.training.settings import TrainingSettings as Settings  # noqa: PLC0415

            words = click.get_current_context().obj or []
            values["fsdp"] = values["fsdp"] or ""
            values["prompt_style"] = _style(values["prompt_style"])
            for name in ("report_to", "fsdp_layers"):
                values[name] = tuple(w for v in values[name] for w in v.split(",") if w)
            if isinstance(values.get("projector"), str):
                values["projector"] = _projector(values["projector"])
            settings = Settings(stage=stage, command=tuple(words), **values)  # type: ignore[arg-type]
            return function(plan=plan, settings=settings)

        return packed  # type: ignore[return-value]

    return wrap


def _style(name: str | None) -> str | None:
    """The prompt style that an option names; `--version`'s values are short for styles."""
    if name is None:
        return None
    from chatbind_cli.model.prompts import STYLE_BY_VERSION, get_style  # noqa: PLC0415

    return get_style(STYLE_BY_VERSION.get(name, name)).name


def _projector(value: str) -> Path:
    """The projector file that is named, or that the stage before in a pipe has made."""
    from chatbind_cli.artifacts import resolve_artifact  # noqa: PLC0415

    return resolve_artifact(value, {"projector"})


def run_stage(settings: TrainingSettings, plan: launch.Dispatch, *extra: str) -> None:
    """Checks the inputs, then trains in this process or in workers.

    Args:
        settings: what to train.
        plan: where.
        extra: words for the workers in place of what this process read from stdin.
    """
    if plan.dry_run:
        dispatched(plan, extra)
        return
    from chatbind_cli.training.inputs import check_inputs, told_to_workers  # noqa: PLC0415

    inputs = check_inputs(settings)
    with told_to_workers(inputs):
        if dispatched(plan, extra):
            return
    from chatbind_cli.training.run import train  # noqa: PLC0415

    train(settings, inputs)

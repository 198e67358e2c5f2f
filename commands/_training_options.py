"""The options that `pretrain` and `finetune` share, by the names of `TrainingSettings`.

The names are those of `transformers.TrainingArguments` and of the original training scripts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from chatbind_cli.files import cache_folder

from ._base import BoolOption, ListOption, in_group
from ._options import (
    FILE,
    FOLDER,
    NEW_FILE,
    NEW_FOLDER,
    encoder_option,
    media_root_options,
    overwrite_option,
    stack,
    without_effect,
)

_PATH = click.Path(path_type=Path)
_WHOLE, _POSITIVE = click.IntRange(min=0), click.IntRange(min=1)
_SHARE, _ABOVE_0 = click.FloatRange(min=0), click.FloatRange(min=0, min_open=True)

_input, _media, _model = in_group("Input"), in_group("Media"), in_group("Model")
_training, _output = in_group("Training"), in_group("Output")
_compute, _switch = in_group("Compute"), in_group("Compute", BoolOption)


class _YesNoAuto(click.ParamType[bool | None]):
    """A switch with a third value, for which the program decides."""

    name = "choice"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> bool | None:
        if str(value).lower() == "auto":
            return None
        return bool(click.BOOL.convert(value, param, ctx))


def _cache_folder(context: click.Context, param: click.Parameter, given: str | None) -> Path | None:
    if given == "none":
        return None
    return cache_folder() / "embeddings" if given is None else Path(given)


input_options = stack(
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
        cls=ListOption,
        metavar="FILE[:WEIGHT]...",
        required=True,
        help="Conversations to train on: LLaVA's JSON array, JSONL or Parquet; text-only ones too. "
        "a.json:2 is seen twice an epoch, of b.json:0.5 a half, drawn by --seed.",
    ),
    _input(
        "--eval-data",
        metavar="FILE",
        type=FILE,
        help="Held-out conversations, for --evaluation-strategy.",
    ),
    media_root_options,
    encoder_option(
        "Media",
        "Default: what projector or model were trained with, else checkpoints/imagebind, then "
        ".checkpoints/imagebind_huge.pth.",
        several="each sees all media that it knows, and has a projector of its own",
    ),
    _media(
        "--store",
        metavar="DIR",
        type=FOLDER,
        multiple=True,
        help="Embeddings that `chatbind encode --store` or an earlier run (in its folder "
        "`embeddings`) made; then media and encoder are not read. Repeat: one for each encoder.",
    ),
    _media(
        "--embedding-cache",
        metavar="DIR|none",
        callback=_cache_folder,
        help="Where embeddings are kept for later runs.  [default: the user's cache folder]",
    ),
    _media(
        "--on-error",
        type=click.Choice(["fail", "skip"]),
        default="fail",
        help="Records or media that cannot be used: name them and stop before training, "
        "or train without them.",
    ),
    _media(
        "--check",
        type=click.Choice(["sample", "all"]),
        default="sample",
        help="How many media and samples are looked at before anything heavy begins.",
    ),
)


model_options = stack(
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
        help="Longer samples are cut there, in tokens; default: 2048, or less where the model "
        "reads less.",
    ),
)


def _number(name: str, kind: click.ParamType[Any], text: str, default: Any = None) -> Any:
    return _training(name, type=kind, default=default, help=text)


schedule_options = stack(
    _number("--num-train-epochs", _SHARE, "Passes over the data."),
    _number("--max-steps", click.INT, "Steps in all, in place of epochs; -1: none set.", -1),
    _number("--per-device-train-batch-size", _POSITIVE, "Samples a process and forward pass."),
    _number("--gradient-accumulation-steps", _POSITIVE, "Forward passes a step."),
    _number(
        "--global-batch-size",
        _POSITIVE,
        "Samples a step, over all processes, in place of --gradient-accumulation-steps.",
    ),
    _training(
        "--group-by-length",
        cls=BoolOption,
        help="Make steps of samples of similar length, in windows of several steps.",
    ),
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
    _number(
        "--embedding-noise",
        _SHARE,
        "Noise on embeddings, fresh each time, in multiples of their norm: helps media of "
        "modalities that training does not see.",
        0.0,
    ),
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

compute_options = stack(
    _switch("--bf16", help="Mixed precision with bfloat16; default: on a GPU that has it."),
    _switch("--fp16", help="Mixed precision with float16."),
    _switch("--tf32", help="TF32 matrix products; default: on a GPU that has them."),
    _switch(
        "--gradient-checkpointing",
        "--activation-checkpointing",
        "gradient_checkpointing",
        type=_YesNoAuto(),
        metavar="[yes|no|auto]",
        help="Compute activations twice to save memory; default: auto, where a GPU's memory asks "
        "for it in the first step.",
    ),
    _switch(
        "--loss-at-labels",
        default=True,
        help="Compute logits only where there is something to learn.",
    ),
    _switch(
        "--share-prefix",
        default=True,
        help="Compute what all samples of a batch begin with once, where the language model is "
        "frozen.",
    ),
    _switch(
        "--compile", help="Compile the language model's layers (torch.compile).", default=False
    ),
    _compute(
        "--fsdp",
        default="",
        show_default=False,
        metavar="WORDS",
        help='Share the model out over processes: "full_shard auto_wrap", or "shard_grad_op" for '
        "less traffic and more memory.",
    ),
    _compute(
        "--fsdp-transformer-layer-cls-to-wrap",
        "fsdp_layers",
        cls=ListOption,
        metavar="CLASS...",
        help="Layers that are shared out one by one; default: the language model's own.",
    ),
    _switch(
        "--packing",
        help="Put whole samples side by side in rows of --model-max-length, in place of padding.",
    ),
    _compute(
        "--dataloader-num-workers",
        type=_WHOLE,
        help="Processes that make batches ahead; default: some on a GPU, none on CPUs.",
    ),
)

output_options = stack(
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

seed_only_options = stack(
    without_effect(
        "--vision-tower", because="the encoder is that of --encoder, ImageBind unless it is named"
    ),
    without_effect(
        "--mm-vision-select-layer",
        because="encoders give one embedding, not a layer's patches",
        needs_value=True,
    ),
    without_effect("--lazy-preprocess", because="samples are always made when they are needed"),
)

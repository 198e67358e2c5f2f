"""Which model answers, and how it generates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chatbind_cli.errors import UsageError
from chatbind_cli.inference.generation_settings import GenerationSettings

from ._base import in_group
from ._engine import engine_option
from ._options import (
    FOLDER,
    attention_option,
    base_option,
    encoder_option,
    gather,
    seed_option,
    without_effect,
)

if TYPE_CHECKING:
    from chatbind_cli.inference.loaded_model import LoadedModel
    from chatbind_cli.plan import Dispatch

_model, _generation, _compute = in_group("Model"), in_group("Generation"), in_group("Compute")


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model answers, as the options say it."""

    model: str
    projector: str | None
    base: Path | None
    encoder: tuple[str, ...]
    allow_encoder_mismatch: bool
    prompt_style: str | None
    adapter: Path | None
    attn_implementation: str
    device_map: str | None
    load_in: str | None
    engine: tuple[str, ...] = ()

    def words_on_line(self) -> tuple[tuple[str, str | None], ...]:
        """For `one_reader`."""
        return ("the model", self.model), ("the projector", self.projector)

    def resolved(self) -> ModelChoice:
        """The same with paths in place of `-`; reads standard input.

        Raises:
            CheckpointError: the stage before has made nothing.
        """
        from chatbind_cli.artifacts import resolve_artifact  # noqa: PLC0415  help need not pay

        projector = self.projector
        if projector is not None:
            projector = str(resolve_artifact(projector, {"projector"}))
        model = str(resolve_artifact(self.model, {"model", "target"}))
        return replace(self, model=model, projector=projector)

    def words(self) -> list[str]:
        """The options that tell a worker what this process has read from standard input."""
        words = ["--model", self.model]
        return words if self.projector is None else [*words, "--projector", self.projector]

    def dispatch(self, plan: Dispatch) -> Dispatch:
        """On how many processes such a model answers.

        Raises:
            UsageError: it takes all GPUs of a machine, and is to be there several times.
        """
        if self.device_map == "cpu":
            return replace(plan, device="cpu")
        if self.device_map is None:
            return plan
        if (plan.num_processes or 1) > (plan.num_machines or 1):
            raise UsageError(
                f"--device-map {self.device_map} spreads one model over all GPUs of a machine, and "
                f"--num-processes {plan.num_processes} asks for several",
                hint="leave one of them out",
            )
        return replace(plan, one_a_machine=True)

    def load(self, device: str, dtype: str) -> LoadedModel:
        """Loads the model; of one that an engine has, the rest."""
        import transformers

        from chatbind_cli.inference.front import load_front  # noqa: PLC0415  torch
        from chatbind_cli.inference.loaded_model import load_model  # noqa: PLC0415

        # it would draw a bar for every folder, on a log as on a terminal
        transformers.utils.logging.disable_progress_bar()
        how: dict[str, Any] = {"base": self.base, "encoders": self.encoder}
        how |= {"allow_encoder_mismatch": self.allow_encoder_mismatch}
        how |= {"device": device, "dtype": dtype}
        if self.engine:
            return load_front(Path(self.model), **how)
        return load_model(
            Path(self.model),
            projector=None if self.projector is None else Path(self.projector),
            attn_implementation=self.attn_implementation,
            adapter=self.adapter,
            device_map=self.device_map,
            load_in=self.load_in,
            **how,
        )


_name = partial(
    _model,
    "-m",
    "--model",
    "--model-name",
    "--model-name-or-path",
    "model",
    metavar="DIR",
    help="A ChatBind model, or a language model that --projector goes with; "
    "- takes the one that the stage before in the pipe has made.",
)
_rest = (
    _model(
        "--projector",
        "--mm-projector",
        metavar="FILE",
        help="Projector to put before the language model in -m; - as for -m.",
    ),
    base_option,
    _model(
        "--adapter",
        advanced=True,
        metavar="DIR",
        type=FOLDER,
        help="Low-rank adapters (LoRA) to put beside the matrices of the model in -m; a folder of "
        "`finetune --lora-r`, or one of peft's.",
    ),
    encoder_option(
        "Model",
        "What the model was trained with; default: where the model says it is, and of ImageBind "
        "else checkpoints/imagebind or .checkpoints/imagebind_huge.pth.",
    ),
    _model(
        "--allow-encoder-mismatch",
        advanced=True,
        is_flag=True,
        help="Take an encoder that is not the one of training.",
    ),
    engine_option,
    _model(
        "--prompt-style",
        "--conv-mode",
        "prompt_style",
        advanced=True,
        metavar="NAME",
        help="Style of the prompt; default: the one that the model was trained in.",
    ),
    attention_option,
    _compute(
        "--device-map",
        advanced=True,
        type=click.Choice(["auto", "balanced", "cpu"]),
        help="Where the layers of a model lie that is too large for one GPU; auto and balanced: "
        "evenly on all GPUs, and in memory what does not fit there.",
    ),
    _compute(
        "--load-in",
        advanced=True,
        type=click.Choice(["8bit", "4bit"]),
        help="Pack the language model into few bits a number, with bitsandbytes, on a GPU.",
    ),
    without_effect("--vision-tower", because="--encoder names the encoder"),
)

model_options = gather("choice", ModelChoice, _name(required=True), *_rest)
"""Which model answers, handed to the function as one argument `choice`."""

model_or_other_options = gather(
    "choice", ModelChoice, _name(default="", show_default=False), *_rest
)
"""The same where something else may answer: without one, `choice.model` is empty."""

_GENERATION = (
    _generation(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        default=512,
        help="Tokens after which an answer is cut off.",
    ),
    _generation(
        "--temperature",
        type=click.FloatRange(min=0.0),
        default=0.0,
        help="0: always the likeliest token, so that answers can be reproduced; the more above 0, "
        "the more freely they are drawn.",
    ),
    _generation(
        "--top-p",
        advanced=True,
        type=click.FloatRange(min=0.0, min_open=True, max=1.0),
        default=1.0,
        help="Draw only from the likeliest tokens that hold this much of the probability.",
    ),
    _generation(
        "--top-k",
        advanced=True,
        type=click.IntRange(min=0),
        default=0,
        help="Draw only from so many of the likeliest tokens; 0: from all.",
    ),
    _generation(
        "--min-p",
        advanced=True,
        type=click.FloatRange(min=0.0, max=1.0),
        default=0.0,
        help="Draw no token that is less likely than this share of the likeliest one.",
    ),
    _generation(
        "--repetition-penalty",
        advanced=True,
        type=click.FloatRange(min=0.0, min_open=True),
        default=1.0,
        help="Makes tokens that are there already, in the question too, less likely; 1: does not.",
    ),
    _generation(
        "--no-repeat-ngram-size",
        advanced=True,
        type=click.IntRange(min=0),
        default=0,
        help="No run of so many tokens comes twice; 0: it may.",
    ),
    _generation(
        "--num-beams",
        advanced=True,
        type=click.IntRange(min=1),
        default=1,
        help="Beams of beam search.",
    ),
    _generation(
        "--length-penalty",
        advanced=True,
        type=float,
        default=1.0,
        help="Of beam search: above 0 long answers gain, below 0 short ones.",
    ),
    _generation(
        "--logprobs",
        is_flag=True,
        help="Say in the record how likely each token of the answer was.",
    ),
    _generation(
        "--stop",
        advanced=True,
        multiple=True,
        metavar="TEXT",
        help="Text that ends an answer; repeat.",
    ),
    seed_option,
)

generation_options = gather("settings", GenerationSettings, *_GENERATION)
"""How answers are generated, handed to the function as one argument `settings`."""

sampling_options = gather(
    "settings",
    GenerationSettings,
    *_GENERATION,
    _generation(
        "--samples",
        type=click.IntRange(min=1),
        default=1,
        help="Answers that are drawn to each question; needs a temperature.",
    ),
)
"""The same for a command that may give several answers to a question."""

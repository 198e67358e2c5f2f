"""Options that go to tensors: how media are read, which model answers, how it generates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.media.options import (
    ACCEL_UNITS,
    CLIP_SAMPLERS,
    DEPTH_UNITS,
    GYRO_UNITS,
    MediaOptions,
)

from ._base import in_group
from ._options import attention_option, base_option, gather, seed_option, without_effect

if TYPE_CHECKING:
    from chatbind_cli.inference.loaded_model import LoadedModel

_model, _generation = in_group("Model"), in_group("Generation")


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model answers, as the options say it."""

    model: str
    projector: str | None
    base: Path | None
    encoder: Path | None
    allow_encoder_mismatch: bool
    prompt_style: str | None
    attn_implementation: str

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

    def load(self, device: str, dtype: str) -> LoadedModel:
        """Loads the model."""
        import transformers

        from chatbind_cli.inference.loaded_model import load_model  # noqa: PLC0415  torch

        # it would draw a bar for every folder, on a log as on a terminal
        transformers.utils.logging.disable_progress_bar()
        return load_model(
            Path(self.model),
            projector=None if self.projector is None else Path(self.projector),
            base=self.base,
            encoder=self.encoder,
            allow_encoder_mismatch=self.allow_encoder_mismatch,
            device=device,
            dtype=dtype,
            attn_implementation=self.attn_implementation,
        )


model_options = gather(
    "choice",
    ModelChoice,
    _model(
        "-m",
        "--model",
        "--model-name",
        "--model-name-or-path",
        "model",
        required=True,
        metavar="DIR",
        help="A ChatBind model, or a language model that --projector goes with; "
        "- takes the one that the stage before in the pipe has made.",
    ),
    _model(
        "--projector",
        "--mm-projector",
        metavar="FILE",
        help="Projector to put before the language model in -m; - as for -m.",
    ),
    base_option,
    _model(
        "--encoder",
        metavar="PATH",
        type=click.Path(path_type=Path),
        help="ImageBind's weights, as a file or folder; default: where the model says they "
        "are, else checkpoints/imagebind or .checkpoints/imagebind_huge.pth.",
    ),
    _model(
        "--allow-encoder-mismatch",
        advanced=True,
        is_flag=True,
        help="Take an encoder that is not the one of training.",
    ),
    _model(
        "--prompt-style",
        "--conv-mode",
        "prompt_style",
        advanced=True,
        metavar="NAME",
        help="Style of the prompt; default: the one that the model was trained in.",
    ),
    attention_option,
    without_effect("--vision-tower", because="the encoder is ImageBind, see --encoder"),
)
"""Which model answers, handed to the function as one argument `choice`."""

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

_POSITIVE = click.FloatRange(min=0, min_open=True)


def _preprocessing(
    name: str, kind: click.ParamType[Any], help_text: str, *, advanced: bool = True
) -> Callable[[Any], Any]:
    return in_group("Preprocessing")(
        f"--{name}",
        type=kind,
        default=getattr(MediaOptions(), name.replace("-", "_")),
        help=help_text,
        advanced=advanced,
    )


media_options = gather(
    "media",
    MediaOptions,
    _preprocessing(
        "audio-clips",
        click.IntRange(min=1),
        "Clips of a sound; their embeddings are averaged.",
    ),
    _preprocessing(
        "video-clips",
        click.IntRange(min=1),
        "Clips of a video, three crops each; their embeddings are averaged.",
    ),
    _preprocessing(
        "clip-seconds",
        _POSITIVE,
        "Length of a clip. A recording that is shorter gives equal clips of all of it.",
    ),
    _preprocessing(
        "clip-sampler",
        click.Choice(CLIP_SAMPLERS),
        "imagebind: clips from start to end; chatbind: as published ChatBind weights want "
        "them, the last clip ending before the end; pytorchvideo: that library's sampler.",
    ),
    _preprocessing(
        "depth-unit",
        click.Choice(DEPTH_UNITS),
        "Of depth maps; auto: 16-bit pictures are millimetres, floating-point arrays metres.",
        advanced=False,
    ),
    _preprocessing(
        "depth-baseline-m",
        _POSITIVE,
        "Baseline of the depth sensor in metres, for disparity = baseline * focal / depth.",
    ),
    _preprocessing("depth-focal-px", _POSITIVE, "Focal length of the depth sensor in pixels."),
    _preprocessing(
        "imu-rate-hz",
        _POSITIVE,
        "Samples a second of motion recordings that have no time column.",
        advanced=False,
    ),
    _preprocessing(
        "imu-start-seconds",
        click.FloatRange(min=0),
        "Where the 5 s window of a motion recording starts; default: its middle. After the "
        "end of a shorter recording its last reading is held.",
    ),
    _preprocessing("imu-accel-unit", click.Choice(ACCEL_UNITS), "Of the accelerometer."),
    _preprocessing("imu-gyro-unit", click.Choice(GYRO_UNITS), "Of the gyroscope."),
    _preprocessing(
        "max-pixels",
        click.IntRange(min=1),
        "Largest picture or frame that is decoded, width times height.",
    ),
)
"""The options of `MediaOptions`, handed to the function as one argument `media`."""


def media_changes(media: MediaOptions) -> dict[str, Any]:
    """The fields of `MediaOptions` that the user has said; in the others the model has its way."""
    context = click.get_current_context()
    return {
        field.name: getattr(media, field.name)
        for field in fields(media)
        if context.get_parameter_source(field.name) not in (None, ParameterSource.DEFAULT)
    }

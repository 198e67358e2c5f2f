"""The options that `ask` and `vqa` share: which model answers, and how it generates."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from chatbind_cli.artifacts import resolve_artifact
from chatbind_cli.errors import UsageError
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.media.options import MediaOptions

from ._base import GroupedOption
from ._options import attention_option, gather, seed_option

if TYPE_CHECKING:
    from chatbind_cli.inference.loaded_model import LoadedModel

_model = partial(click.option, cls=GroupedOption, group="Model")
_generation = partial(click.option, cls=GroupedOption, group="Generation")


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model answers, as the options say it."""

    model: str
    projector: str | None
    encoder: Path | None
    allow_encoder_mismatch: bool
    prompt_style: str | None
    attn_implementation: str

    @property
    def reads_stdin(self) -> bool:
        """Whether the model or projector is named on standard input."""
        return "-" in (self.model, self.projector)

    def resolved(self) -> ModelChoice:
        """The same with paths in place of `-`; reads standard input.

        Raises:
            CheckpointError: the stage before has made nothing.
            UsageError: both are to come from standard input.
        """
        if self.model == "-" and self.projector == "-":
            raise UsageError("-m - and --projector - cannot both read standard input")
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
        metavar="FILE",
        help="Projector to put before the language model in -m; - as for -m.",
    ),
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
)
"""Which model answers, handed to the function as one argument `choice`."""

generation_options = gather(
    "settings",
    GenerationSettings,
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
        "--num-beams",
        advanced=True,
        type=click.IntRange(min=1),
        default=1,
        help="Beams of beam search.",
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
"""How answers are generated, handed to the function as one argument `settings`."""


def media_changes(media: MediaOptions) -> dict[str, Any]:
    """The fields of `MediaOptions` that the user has said; in the others the model has its way."""
    context = click.get_current_context()
    return {
        field.name: getattr(media, field.name)
        for field in fields(media)
        if context.get_parameter_source(field.name) not in (None, ParameterSource.DEFAULT)
    }

"""The options that `ask` and `vqa` share: which model answers, and how it generates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from chatbind_cli.answering.settings import GenerationSettings
from chatbind_cli.artifacts import resolve_artifact
from chatbind_cli.errors import UsageError
from chatbind_cli.media.options import MediaOptions

from ._base import GroupedOption
from ._options import seed_option, stack

if TYPE_CHECKING:
    from chatbind_cli.answering.opening import OpenedModel
    from chatbind_cli.answering.session import Answerer

F = TypeVar("F", bound=Callable[..., Any])

_model = partial(click.option, cls=GroupedOption, group="Model")
_generation = partial(click.option, cls=GroupedOption, group="Generation")

_model_options = stack(
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
        is_flag=True,
        help="Take an encoder that is not the one of training.",
    ),
    _model(
        "--prompt-style",
        "--conv-mode",
        "prompt_style",
        metavar="NAME",
        help="Style of the prompt; default: the one that the model was trained in.",
    ),
)

_generation_options = stack(
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
        type=click.FloatRange(min=0.0, min_open=True, max=1.0),
        default=1.0,
        help="Draw only from the likeliest tokens that hold this much of the probability.",
    ),
    _generation("--num-beams", type=click.IntRange(min=1), default=1, help="Beams of beam search."),
    _generation("--stop", multiple=True, metavar="TEXT", help="Text that ends an answer; repeat."),
    seed_option,
)


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model answers, as the options say it."""

    model: str
    projector: str | None
    encoder: Path | None
    allow_encoder_mismatch: bool
    prompt_style: str | None

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
        return ModelChoice(
            model=str(resolve_artifact(self.model, {"model", "target"})),
            projector=projector,
            encoder=self.encoder,
            allow_encoder_mismatch=self.allow_encoder_mismatch,
            prompt_style=self.prompt_style,
        )

    def words(self) -> list[str]:
        """The options that tell a worker what this process has read from standard input."""
        words = ["--model", self.model]
        return words if self.projector is None else [*words, "--projector", self.projector]

    def open(self, device: str, dtype: str) -> OpenedModel:
        """Loads the model."""
        import transformers

        from chatbind_cli.answering.opening import open_model  # noqa: PLC0415  torch

        # it would draw a bar for every folder, on a log as on a terminal
        transformers.utils.logging.disable_progress_bar()

        return open_model(
            Path(self.model),
            projector=None if self.projector is None else Path(self.projector),
            device=device,
            dtype=dtype,
        )

    def answerer(self, opened: OpenedModel, media: Mapping[str, Any]) -> Answerer:
        """A model that answers about files that the user names.

        Args:
            opened: the model.
            media: see `media_changes`.
        """
        from chatbind_cli.answering.opening import EncoderFinder  # noqa: PLC0415  torch
        from chatbind_cli.answering.perception import Perception  # noqa: PLC0415
        from chatbind_cli.answering.session import Answerer  # noqa: PLC0415

        finder = EncoderFinder(opened, self.encoder, self.allow_encoder_mismatch)
        perception = Perception(finder.open, options=opened.media_options(**media))
        bundle = opened.bundle
        return Answerer(bundle.model, bundle.tokenizer, perception, style=self.prompt_style)


def model_options(function: F) -> F:
    """The options of `ModelChoice`, handed to the function as one argument `choice`."""

    @wraps(function)
    def packed(*args: Any, **kwargs: Any) -> Any:
        names = ("model", "projector", "encoder", "allow_encoder_mismatch", "prompt_style")
        choice = ModelChoice(**{name: kwargs.pop(name) for name in names})
        return function(*args, choice=choice, **kwargs)

    return _model_options(packed)  # type: ignore[return-value]


def generation_options(function: F) -> F:
    """The options of `GenerationSettings`, handed to the function as one argument `settings`."""

    @wraps(function)
    def packed(*args: Any, **kwargs: Any) -> Any:
        names = ("max_new_tokens", "temperature", "top_p", "num_beams", "seed", "stop")
        settings = GenerationSettings(**{name: kwargs.pop(name) for name in names})
        return function(*args, settings=settings, **kwargs)

    return _generation_options(packed)  # type: ignore[return-value]


def media_changes(media: MediaOptions) -> dict[str, Any]:
    """The fields of `MediaOptions` that the user has said; in the others the model has its way."""
    context = click.get_current_context()
    return {
        field.name: getattr(media, field.name)
        for field in fields(media)
        if context.get_parameter_source(field.name) not in (None, ParameterSource.DEFAULT)
    }

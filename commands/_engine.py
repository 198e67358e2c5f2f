"""`--engine`: the language model answers elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from chatbind_cli.errors import UsageError
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.urls import check_url

from ._base import in_group, is_given

if TYPE_CHECKING:
    from chatbind_cli.inference.loaded_model import LoadedModel
    from chatbind_cli.inference.remote_engine import RemoteEngine

    from ._inference import ModelChoice

_IN_FLIGHT = 64  # an engine

engine_option = in_group("Model")(
    "--engine",
    multiple=True,
    metavar="URL",
    help="Have the language model answer elsewhere: the address (http://HOST:PORT/v1) of a vLLM "
    "server of what `chatbind convert MODEL --language-model` has made; repeat for several. "
    "Encoder, projector and word embeddings stay here.",
)

batch_size_option = in_group("Compute")(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    help="Questions that are answered together, at most; answers do not depend on it. With "
    "--engine: 64 for each, unless given.",
)


def check_engine(choice: ModelChoice, settings: GenerationSettings) -> None:
    """Refuses what does not go with an engine, before anything is loaded.

    Raises:
        UsageError: it is asked for.
    """
    if not choice.engine:
        return
    for url in choice.engine:
        check_url(url)
    settings.refuse_elsewhere()
    if choice.projector is not None or choice.adapter is not None:
        option = "--projector" if choice.adapter is None else "--adapter"
        raise UsageError(
            f"--engine goes with a ChatBind folder, and not with {option}",
            hint="`chatbind convert` makes one of the two",
        )
    if choice.attn_implementation != "auto" or choice.device_map or choice.load_in:
        raise UsageError(
            "--engine has the language model elsewhere: --attn-implementation, --device-map and "
            "--load-in say how it is held here"
        )


def in_flight(choice: ModelChoice, batch_size: int) -> int:
    """Questions that are asked at a time: as many as the user says, or as keep engines busy."""
    if not choice.engine or is_given("batch_size"):
        return batch_size
    return _IN_FLIGHT * len(choice.engine)


@contextmanager
def connected(
    choice: ModelChoice, loaded: LoadedModel, in_flight: int = 1
) -> Iterator[RemoteEngine | None]:
    """Yields the engine, with so many questions at a time; None where the model answers here.

    Raises:
        ChatBindError: it is not there, or serves another model.
    """
    if not choice.engine:
        yield None
        return
    from chatbind_cli.inference.remote_engine import RemoteEngine  # noqa: PLC0415  torch

    style = choice.prompt_style
    with RemoteEngine(loaded, choice.engine, style=style, in_flight=in_flight) as engine:
        yield engine

"""`chatbind serve`: a model for every client of OpenAI's API."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path

import click

from chatbind_cli.errors import ChatBindError, UsageError
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.serving.limits import Limits

from . import _base
from ._base import in_group
from ._engine import batch_size_option, check_engine, connected, in_flight
from ._inference import ModelChoice, generation_options, model_options
from ._options import FOLDER, device_options
from ._preprocessing import media_changes, media_options

_server, _limits = in_group("Server"), in_group("Limits")
_media, _compute = in_group("Media"), in_group("Compute")

_FETCH_S = 30.0  # for a medium behind an address


@_base.command(
    "serve",
    examples=[
        "chatbind serve -m model",
        "chatbind serve -m model --media-root media --allow-remote --max-waiting 64",
    ],
    elsewhere=[
        "chatbind serve -m checkpoints/chatbind-7b --engine http://localhost:8001/v1",
        "chatbind serve -m model --host 0.0.0.0 --api-key KEY --media-root /data/media",
    ],
)
@model_options
@_server(
    "--host",
    default="127.0.0.1",
    help="Address or name to listen at; 0.0.0.0: at all that this machine has.",
)
@_server(
    "--port",
    type=click.IntRange(min=0, max=65535),
    default=8000,
    help="Port to listen at; 0: one that is free. Where it is, the first line of output says.",
)
@_server(
    "--api-key",
    metavar="KEY",
    help="What clients must show (Authorization: Bearer KEY). In the environment "
    "(CHATBIND_SERVE_API_KEY) it cannot be read from the list of processes.",
)
@_media(
    "--media-root",
    metavar="DIR",
    type=FOLDER,
    help="Folder whose files requests may name by their paths in it; default: none may.",
)
@_media(
    "--allow-remote",
    is_flag=True,
    help="Fetch media from the http(s) addresses that requests name, if those are public.",
)
@media_options
@_limits(
    "--max-body",
    metavar="MB",
    type=click.IntRange(min=1, max=Limits.body_bytes >> 20),
    default=Limits.body_bytes >> 20,
    help="Longest request in MiB; media in it take a third more than as files.",
)
@_limits(
    "--max-waiting",
    metavar="N",
    type=click.IntRange(min=1),
    default=Limits.waiting,
    help="Questions that may wait; further ones are sent away (429) until there is room.",
)
@_limits(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    default=Limits.request_s,
    help="Time for an answer, waiting included.",
)
@_limits(
    "--grace",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=Limits.grace_s,
    help="Time for answers that are under way when SIGTERM or Ctrl-C ends the server.",
)
@generation_options
@device_options
@batch_size_option
@_compute("--num-workers", type=click.IntRange(min=1), default=2, help="Media decoded at a time.")
def command(
    choice: ModelChoice,
    host: str,
    port: int,
    api_key: str | None,
    media_root: Path | None,
    allow_remote: bool,
    media: MediaOptions,
    max_body: int,
    max_waiting: int,
    timeout: float,
    grace: float,
    settings: GenerationSettings,
    device: str,
    dtype: str,
    batch_size: int,
    num_workers: int,
) -> None:
    """Answer whoever speaks OpenAI's API: chat, embeddings, and a page at /.

    All that is asked at the same time is answered together. What a request says of how its answer
    is generated goes before the options. Where it is served, the first line of output says.
    """
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key):
        raise UsageError("the --api-key must be printable ASCII, and not empty")
    check_engine(choice, settings)
    missing = [
        name for name in ("starlette", "uvicorn", "prometheus_client") if not find_spec(name)
    ]
    if missing:
        raise ChatBindError(
            f"{', '.join(missing)} must be installed to serve", hint="pip install 'chatbind[serve]'"
        )
    choice = choice.resolved()
    # imported here: they bring torch
    from chatbind_cli.media.root import MediaRoot  # noqa: PLC0415
    from chatbind_cli.serving.serve import serve  # noqa: PLC0415

    batch_size = in_flight(choice, batch_size)
    serve(
        partial(choice.load, device, dtype),
        settings,
        connect=partial(connected, choice, in_flight=batch_size),
        media=media_changes(media),
        media_root=MediaRoot.guarded(
            media_root, remote=allow_remote, most_bytes=max_body << 20, seconds=_FETCH_S
        ),
        host=host,
        port=port,
        key=api_key,
        limits=Limits(
            body_bytes=max_body << 20,
            waiting=max_waiting,
            connections=max_waiting + batch_size + 256,
            request_s=timeout,
            grace_s=grace,
        ),
        batch_size=batch_size,
        workers=num_workers,
        prompt_style=choice.prompt_style,
    )

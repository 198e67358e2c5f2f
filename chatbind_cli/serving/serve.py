"""Serves a model to whoever speaks OpenAI's API: what runs inside `serve`."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from typing import Any

from chatbind_cli.artifacts import emit_record
from chatbind_cli.console import note
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.engine import Engine
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.loaded_model import LoadedModel
from chatbind_cli.inference.media_encoder import MediaEncoder
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.root import MediaRoot
from chatbind_cli.serving.app import Api
from chatbind_cli.serving.desk import Desk
from chatbind_cli.serving.door import Door
from chatbind_cli.serving.incoming import Bodies
from chatbind_cli.serving.limits import Limits
from chatbind_cli.serving.listening import Server, address_of, bind
from chatbind_cli.serving.metrics import Metrics
from chatbind_cli.serving.page.routes import page_routes

_LOOPBACK = ("127.", "::1")
_READERS = 32
"""Questions whose media may be on their way at a time: slow addresses hold up nobody else."""


def serve(
    load: Callable[[], LoadedModel],
    settings: GenerationSettings,
    *,
    connect: Callable[[LoadedModel], AbstractContextManager[Engine | None]],
    media: Mapping[str, Any],
    media_root: MediaRoot,
    host: str,
    port: int,
    key: str | None,
    limits: Limits,
    batch_size: int,
    workers: int,
    prompt_style: str | None,
) -> None:
    """Serves until it is told to stop, as the help of `serve` says for the options.

    Raises:
        ChatBindError: it cannot begin, or nothing more can be answered.
        KeyboardInterrupt: it was told so with Ctrl-C.
    """
    with closing(bind(host, port)) as listening:
        address = address_of(listening)
        if key is None and not listening.getsockname()[0].startswith(_LOOPBACK):
            note(f"whoever reaches {address} can ask: --api-key asks for a key")
        loaded = load()
        options = loaded.media_options(**media)
        encoder = MediaEncoder(loaded, options=options, open_media=media_root.open, workers=workers)

        @contextmanager
        def open_answerer() -> Iterator[Answerer]:
            how: dict[str, Any] = {
                "style": prompt_style,
                "batch_size": batch_size,
                "readers": _READERS,
            }
            with connect(loaded) as engine:
                yield Answerer(loaded, encoder, engine=engine, **how)

        desk = Desk(open_answerer, settings, most_waiting=limits.waiting)
        server = make_server(
            desk,
            settings,
            options,
            model_id=loaded.model_id,
            host=host,
            key=key,
            limits=limits,
            on_ready=partial(_say_where, address, loaded.model_id),
        )
        loop = asyncio.new_event_loop()
        # `asyncio.run` would wait for threads, which may still read media for those who have left
        loop.run_until_complete(server.serve([listening]))
        loop.close()
    if desk.failure is not None and desk.state == "failed":
        raise desk.failure
    if server.told == signal.SIGINT:
        raise KeyboardInterrupt


def make_server(
    desk: Desk,
    settings: GenerationSettings,
    options: MediaOptions,
    *,
    model_id: str,
    host: str,
    key: str | None,
    limits: Limits,
    on_ready: Callable[[], None],
) -> Server:
    """The server of a desk; see `serve`."""
    metrics = Metrics(lambda: desk.waiting, lambda: desk.under_way, lambda: server.connections)
    bodies = Bodies(limits)
    api = Api(desk, settings, model_id=model_id, bodies=bodies, limits=limits, metrics=metrics)
    routes = [*api.routes(), *page_routes(bodies.content, options)]
    door = Door(routes, key=key, host=host, metrics=metrics)
    server = Server(door, desk, limits, on_ready)
    return server


def _say_where(address: str, model_id: str) -> None:
    """Says where the model is served, in words for a person."""
    if sys.stdout.isatty():
        sys.stdout.write(f"serving {model_id} at {address}/v1\n")
        sys.stdout.flush()
    else:
        emit_record({"serving": f"{address}/v1", "model": model_id})

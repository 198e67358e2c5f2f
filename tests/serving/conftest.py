"""Real servers of the tiny world's model, and OpenAI's own client."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.loaded_model import load_model
from chatbind_cli.inference.media_encoder import MediaEncoder
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.root import MediaRoot
from chatbind_cli.serving.desk import Desk
from chatbind_cli.serving.limits import Limits
from chatbind_cli.serving.listening import Server, address_of, bind
from chatbind_cli.serving.serve import make_server
from tests.inference.conftest import reads
from tests.inference.world import World, make_world, save_tiny_encoder
from tests.recordings import Film, film

__all__ = ["film", "reads"]

SETTINGS = GenerationSettings(max_new_tokens=12)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Encoder, model and media; nobody changes them."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def media(world: World, film: Film) -> dict[str, Path]:
    """A file of each modality."""
    readings = np.random.default_rng(3).normal(size=(300, 6))
    rows = np.column_stack([np.arange(300) / 100, readings])
    header = "time,ax,ay,az,gx,gy,gz"
    path = world.media / "taps.csv"
    np.savetxt(path, rows, fmt="%.4f", delimiter=",", header=header, comments="")
    (world.media / "film.mp4").write_bytes(film(frames=20))
    names = {"image": "2.png", "video": "film.mp4", "audio": "tone.wav"}
    names |= {"depth": "depth.png", "thermal": "3.png", "imu": "taps.csv"}
    return {modality: world.media / name for modality, name in names.items()}


@pytest.fixture(scope="session")
def text_encoder(world: World) -> Path:
    """An encoder that has a text tower, too."""
    save_tiny_encoder(world.folder / "text-encoder", seed=0, texts=True)
    return world.folder / "text-encoder"


@pytest.fixture(scope="session")
def answerer(world: World, text_encoder: Path) -> Answerer:
    """What the servers answer with."""
    loaded = load_model(
        world.model, encoders=[text_encoder], allow_encoder_mismatch=True, device="cpu"
    )
    root = MediaRoot.guarded(world.media, remote=False, most_bytes=1 << 20, seconds=5.0)
    encoder = MediaEncoder(loaded, open_media=root.open)
    return Answerer(loaded, encoder, batch_size=8, readers=2)


@dataclass
class Running:
    """A server in a thread of this process, as a client sees it."""

    url: str
    server: Server
    desk: Desk
    loop: asyncio.AbstractEventLoop
    client: openai.OpenAI

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **more)

    def post(self, path: str, **more: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, **more)

    @property
    def address(self) -> tuple[str, int]:
        """For a socket."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)


@contextmanager
def serving(answerer: Answerer, *, key: str | None = None, **limits: Any) -> Iterator[Running]:
    """A server of what answers here, until the block ends."""

    @contextmanager
    def here() -> Iterator[Answerer]:
        yield answerer

    with serving_from(here, key=key, **limits) as running:
        yield running


@contextmanager
def serving_from(
    open_answerer: Callable[[], AbstractContextManager[Answerer]],
    *,
    key: str | None = None,
    **limits: Any,
) -> Iterator[Running]:
    """The same for one that is opened, again where its engine has gone."""
    limited = Limits(**limits)
    with closing(bind("127.0.0.1", 0)) as listening:
        desk = Desk(open_answerer, SETTINGS, most_waiting=limited.waiting)
        ready = threading.Event()
        names: Any = {"model_id": "model", "host": "127.0.0.1", "key": key, "on_ready": ready.set}
        server = make_server(desk, SETTINGS, MediaOptions(), limits=limited, **names)
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_until_complete, args=[server.serve([listening])])
        thread.start()
        try:
            url = address_of(listening)
            assert ready.wait(20)
            # it tries nothing twice
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key or "x", max_retries=0) as client:
                yield Running(url, server, desk, loop, client)
        finally:
            if server.told is None:  # a second word ends the process
                loop.call_soon_threadsafe(server.stop, 15)
            thread.join(30)
            assert not thread.is_alive()
            loop.close()


@pytest.fixture(scope="module")
def running(answerer: Answerer) -> Iterator[Running]:
    """The server that most tests ask."""
    with serving(answerer) as server:
        yield server

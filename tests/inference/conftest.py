"""The tiny world that all tests of answering share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch

from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration
from chatbind_cli.model.whole import language_model
from tests.chat_server import judge_server, quick_retries
from tests.inference.engine_server import EngineServer, Served
from tests.inference.world import World, make_world

__all__ = ["judge_server", "quick_retries"]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Encoder, model and media; nobody changes them."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shape of everything that a model reads: rows, tokens."""
    shapes: list[tuple[int, int]] = []
    forward = ChatBindForConditionalGeneration.forward

    @wraps(forward)
    def counted(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        shapes.append((input_ids.shape[0], input_ids.shape[1]))
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(ChatBindForConditionalGeneration, "forward", counted)
    return shapes


@pytest.fixture(scope="session")
def served(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the world's language model by itself."""
    folder = tmp_path_factory.mktemp("served") / "lm"
    language_model(world.model, folder)
    return folder


@pytest.fixture(scope="session")
def served_model(served: Path) -> Served:
    return Served(served)


@pytest.fixture
def start(
    served_model: Served, monkeypatch: pytest.MonkeyPatch, quick_retries: None
) -> Iterator[Callable[..., EngineServer]]:
    """Starts engines that serve it, or another `model`."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with ExitStack() as servers:

        def start(**options: Any) -> EngineServer:
            server = EngineServer(options.pop("model", served_model), **options)
            servers.callback(server.close)
            return server

        yield start

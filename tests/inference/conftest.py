"""The tiny world that all tests of answering share."""

from __future__ import annotations

from functools import wraps
from typing import Any

import pytest
import torch

from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration
from tests.chat_server import judge_server, quick_retries
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

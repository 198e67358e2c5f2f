"""The tiny world that all tests of answering share."""

from __future__ import annotations

import pytest

from tests.inference.world import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Encoder, model and media; nobody changes them."""
    return make_world(tmp_path_factory.mktemp("world"))

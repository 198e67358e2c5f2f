"""Checkpoint folders, and a hub that serves one."""

import pytest
import torch

from tests.checkpoints.checkpoints import Maker, bits
from tests.download.conftest import hub_at, server

__all__ = ["hub_at", "server"]


@pytest.fixture
def make(tmp_path):
    """`make(name, tensors, layout, shards)` writes a checkpoint folder and returns it."""
    return Maker(tmp_path / "made")


@pytest.fixture
def same_bits():
    """Whether two tensors have the same dtype, shape and bits."""

    def compare(a, b):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))

    return compare

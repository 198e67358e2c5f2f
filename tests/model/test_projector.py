"""The projector: shapes, layouts, and the size of fresh soft tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from chatbind_cli.model.projector import Projector


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize(("tokens", "layout"), [(1, "split"), (3, "split"), (3, "repeat")])
def test_an_embedding_becomes_tokens_of_the_wanted_width(
    kind: str, tokens: int, layout: str
) -> None:
    projector = Projector([8], 16, kind=kind, tokens=tokens, layout=layout)
    assert projector(torch.randn(5, 8)).shape == (5, tokens, 16)


def test_linear_is_a_matrix_and_a_bias() -> None:
    projector = Projector([8], 16, tokens=2)
    state = projector.state_dict()
    vectors = torch.randn(3, 8)
    by_hand = vectors @ state["layers.0.weight"].T + state["layers.0.bias"]
    torch.testing.assert_close(projector(vectors), by_hand.reshape(3, 2, 16))


def test_the_two_layer_projector_has_a_gelu_between() -> None:
    projector = Projector([8], 16, kind="mlp2x_gelu")
    s = projector.state_dict()
    vectors = torch.randn(3, 8)
    hidden = functional.gelu(vectors @ s["layers.0.weight"].T + s["layers.0.bias"])
    by_hand = hidden @ s["layers.2.weight"].T + s["layers.2.bias"]
    torch.testing.assert_close(projector(vectors)[:, 0], by_hand)


def test_repeated_tokens_are_equal_and_split_ones_are_not() -> None:
    vectors = torch.randn(2, 8)
    repeated = Projector([8], 16, tokens=3, layout="repeat")(vectors)
    assert torch.equal(repeated[:, 0], repeated[:, 2])
    split = Projector([8], 16, tokens=3)(vectors)
    assert not torch.equal(split[:, 0], split[:, 2])


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("width", [32, 1024])
def test_fresh_soft_tokens_are_as_large_as_words_however_wide_the_encoder(
    kind: str, width: int
) -> None:
    torch.manual_seed(0)
    projector = Projector([width], 512, kind=kind)
    projector.reset_parameters(std=0.02)
    vectors = functional.normalize(torch.randn(64, width), dim=-1)
    # 64 * 512 samples of a standard deviation: 0.5 %; GELU's moment is rounded: 10 % is ample
    assert projector(vectors).std().item() == pytest.approx(0.02, rel=0.1)

"""Whether activations are computed twice follows from what the first step takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from chatbind_cli.training.checkpointing import Trial, recomputes
from tests.training.test_prefix import chatbind, collator, plain, samples

GIB = 2**30


class Room:
    """A device of 100 GiB, of which the model takes 10 and a pass of three rows of 24 a few."""

    def __init__(self, activations: float) -> None:
        self._activations = activations

    def begin(self) -> int:
        return 10 * GIB

    def highest(self) -> int:
        return round((10 + self._activations) * GIB)

    def room(self) -> int:
        return 100 * GIB


def tried(activations: float, *, rows: int = 3, length: int = 21, others: bool = False) -> Any:
    model = chatbind()
    batch = plain(collator(model)(samples()))
    assert batch["input_ids"].shape == (3, 21)
    said: list[bool] = []

    def agreed(mine: bool) -> bool:
        said.append(mine)
        return mine or others

    state = torch.random.get_rng_state()
    Trial(model, Room(activations), rows, length, agreed)(batch)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert len(said) == 1
    return model


@pytest.mark.parametrize(
    ("activations", "more", "on"),
    [
        (79.0, {}, False),  # 89 of 100
        (81.0, {}, True),
        (30.0, {"length": 42}, False),  # twice as long: 10 + 60
        (30.0, {"length": 63}, True),
        (30.0, {"rows": 9}, True),
        (30.0, {"others": True}, True),
    ],
)
def test_it_is_on_where_the_largest_batch_would_not_fit(
    activations: float, more: dict[str, Any], on: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tried(activations, **more)
    assert recomputes(model) == on
    told = capsys.readouterr().err.splitlines()
    assert [line.startswith("chatbind: gradient checkpointing is on") for line in told] == [
        True
    ] * on


def test_it_is_on_where_memory_runs_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(nn.Linear, "forward", full)
    assert recomputes(tried(0.0))
    assert "is more than there is, of 100.0 GiB" in capsys.readouterr().err


def test_a_prefix_that_is_cut_off_is_no_activation() -> None:
    model = chatbind()
    batch = plain(collator(model)(samples()))
    # 36 of 42 columns are left, in batches of which 21 were measured: 10 + 50 * 36 / 21
    Trial(model, Room(50), 3, 42, bool)(batch, prefix=6)
    assert recomputes(model)
    other = chatbind()
    Trial(other, Room(50), 3, 42, bool)(batch, prefix=15)
    assert not recomputes(other)

"""Switches of speed change a run by rounding only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.conftest import Outcome, World

PLAIN = ("--share-prefix", "no", "--loss-at-labels", "no")


@pytest.fixture
def run(
    world: World, here: Callable[..., Outcome], tmp_path: Path
) -> Callable[..., tuple[list[dict[str, Any]], dict[str, torch.Tensor], str]]:
    def call(stage: str, *words: str) -> Any:
        output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        line = world.args(output, "--gradient-accumulation-steps", "2", "--max-steps", "4", *words)
        line[line.index("-m") + 1] = str(world.llama_without_dropout)
        done = here(stage, *line)
        assert done.code == 0, done.stderr
        (weights,) = output.glob("*.safetensors")
        return [r for r in done.records if "loss" in r][:-1], load_file(weights), done.stderr

    return call


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_run_is_the_plain_run(stage: str, run: Any) -> None:
    fast, weights, told = run(stage)
    plain, wanted, _ = run(stage, *PLAIN)
    assert "has no effect" not in told
    for one, other in zip(fast, plain, strict=True):
        for key in ("loss", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=2e-5), (one["step"], key)
    for name, tensor in weights.items():
        # Adam's first steps are as large for a gradient of 1e-9 as for one of 1
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=2e-5, msg=name)


def test_an_evaluation_has_the_plain_loss(world: World, run: Any) -> None:
    words = ("--eval-data", str(world.instructions), "--eval-strategy", "steps")
    words += ("--eval-steps", "4")
    outcomes = [run("pretrain", *words, *more) for more in ((), PLAIN)]
    losses = [[r["eval_loss"] for r in log if "eval_loss" in r] for log, _, _ in outcomes]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

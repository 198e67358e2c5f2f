"""The loss on held-out conversations is the same however they are split."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from chatbind_cli.training.held_out import held_out_loss, shares


@pytest.mark.parametrize(("samples", "size", "world"), [(7, 2, 1), (7, 2, 3), (5, 1, 8), (8, 2, 4)])
def test_each_sample_counts_once_and_all_processes_take_part(samples, size, world) -> None:
    mine = [shares(samples, size, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in mine}) == 1
    counted = [i for batches in mine for numbers, counts in batches if counts for i in numbers]
    assert sorted(counted) == list(range(samples))


def test_tokens_count_and_not_batches() -> None:
    def batch(labelled: int) -> dict[str, torch.Tensor]:
        labels = torch.full((1, 9), -100)
        labels[:, : labelled + 1] = 1
        return {"labels": labels}

    losses = iter([torch.tensor(2.0), torch.tensor(4.0), torch.tensor(math.nan), torch.tensor(9.0)])
    mean = held_out_loss(
        [batch(6), batch(2), batch(0), batch(5)],
        [True, True, True, False],
        lambda _: next(losses),
        lambda found: found + torch.tensor([4.0, 2.0]),  # of another process
    )
    assert mean == pytest.approx((12 + 8 + 4) / (8 + 2))


def test_batches_of_every_size_give_one_loss(world, here, tmp_path: Path) -> None:
    found = set()
    for size in ("1", "3", "16"):
        words = ("--eval-data", str(world.instructions), "--evaluation-strategy", "steps")
        words += ("--max-steps", "1", "--per-device-eval-batch-size", size)
        done = here("pretrain", *world.args(tmp_path / size, *words))
        assert done.code == 0, done.stderr
        (loss,) = re.findall(r'"eval_loss": ([\d.]+)', done.stdout)
        found.add(round(float(loss), 4))
    assert len(found) == 1

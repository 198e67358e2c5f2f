"""The loss on held-out conversations is the same however they are split."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chatbind_cli.training.batches import Share, StepSamples
from chatbind_cli.training.held_out import held_out_batches, held_out_loss
from chatbind_cli.training.samples import Collator
from chatbind_cli.training.throughput import Work
from tests.training.test_batches import Texts


@pytest.mark.parametrize(("samples", "size", "world"), [(7, 2, 1), (7, 2, 3), (5, 1, 8), (8, 2, 4)])
def test_each_sample_counts_once_and_all_processes_take_part(samples, size, world) -> None:
    texts: Any = Texts([3 + n for n in range(samples)])
    mine = [
        list(
            held_out_batches(
                StepSamples(texts, Collator(0), Share(rank, world, size), np.array(texts.lengths)),
                workers=0,
            )
        )
        for rank in range(world)
    ]
    assert len({len(batches) for batches in mine}) == 1
    all_ = [batch for batches in mine for batch in batches]
    assert max(len(batch["samples"]) for batch in all_) <= size
    counted = [i for batch in all_ if batch["work"].samples for i in batch["samples"]]
    assert sorted(counted) == list(range(samples))
    assert sum(batch["work"].labelled for batch in all_) == sum(texts.lengths) - samples


def test_tokens_count_and_not_batches() -> None:
    losses = iter([torch.tensor(2.0), torch.tensor(4.0), torch.tensor(math.nan)])
    mean = held_out_loss(
        [{"work": Work(1, 9, labelled, 45)} for labelled in (6, 2, 0)],
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

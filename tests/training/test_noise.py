"""Noise on embeddings: how much, and the same however the work is divided and interrupted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from chatbind_cli.training.noise import EmbeddingNoise
from tests.training.test_resume import sha256, unfinish

ROWS = torch.stack([torch.full((1024,), 2.0), torch.arange(1024.0)])


def drawn(seed: int = 0, epoch: int = 0, index: int = 0, scale: float = 1.0) -> torch.Tensor:
    return EmbeddingNoise(scale, seed, [1024]).add(ROWS, index, epoch) - ROWS


def test_only_what_an_encoder_made_gets_noise() -> None:
    wide = torch.zeros(2, 40)
    wide[0, :16], wide[1, 16:] = 2.0, 3.0
    rows = torch.stack(
        [EmbeddingNoise(0.5, 1, [16, 24]).add(wide, index, 0) - wide for index in range(200)]
    )
    assert not rows[:, 0, 16:].any() and not rows[:, 1, :16].any()
    # half as long as what each encoder made: 200 draws scatter by about a hundredth
    lengths = rows.norm(dim=-1).square().mean(dim=0).sqrt()
    torch.testing.assert_close(lengths, 0.5 * wide.norm(dim=-1), rtol=0.03, atol=0)


@pytest.mark.parametrize("scale", [0.25, 1.5])
def test_noise_is_gaussian_and_as_long_as_was_asked(scale: float) -> None:
    many = torch.stack([drawn(index=i, scale=scale) for i in range(50)])
    norms = ROWS.norm(dim=-1)
    # the norm of 1024 normal numbers varies by 1/sqrt(2 * 1024), so a mean of 50 by 0.3 %
    torch.testing.assert_close(many.norm(dim=-1).mean(dim=0), scale * norms, rtol=0.01, atol=0)
    for place in range(2):
        numbers = (many[:, place] / (scale * norms[place] / 32)).flatten()
        # 51,200 numbers: deviations of the moments' estimates are 0.0044, 0.0062 and 0.043
        assert abs(float(numbers.mean())) < 0.02
        assert abs(float(numbers.pow(2).mean()) - 1) < 0.03
        assert abs(float(numbers.pow(4).mean()) - 3) < 0.2


def test_noise_follows_from_seed_epoch_sample_and_place_alone() -> None:
    assert torch.equal(drawn(7, 2, 5), drawn(7, 2, 5))
    others = [drawn(8, 2, 5), drawn(7, 3, 5), drawn(7, 2, 6), drawn(2, 7, 5)]
    for other in others:
        cosine = torch.cosine_similarity(drawn(7, 2, 5), other)
        assert (cosine.abs() < 0.15).all()  # independent ones: 0 give or take 0.03
    first, second = drawn(7, 2, 5)
    assert torch.cosine_similarity(first, second, dim=0).abs() < 0.15
    # a medium's noise does not depend on how many others there are
    noise = EmbeddingNoise(1.0, 7, [1024])
    assert torch.equal(noise.add(ROWS[:1], 5, 0)[0], noise.add(ROWS, 5, 0)[0])


def test_rows_of_the_store_stay_as_they_are() -> None:
    before = ROWS.clone()
    EmbeddingNoise(1.0, 0, [1024]).add(ROWS, 0, 0)
    assert torch.equal(ROWS, before)
    assert not EmbeddingNoise(1.0, 0, [4]).add(torch.zeros(1, 4), 0, 0).any()


def test_a_negative_seed_is_a_seed() -> None:
    assert not torch.equal(drawn(-1), drawn(1))


def losses(records: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in records if "loss" in record]


WORDS = ("--num-train-epochs", "2", "--learning-rate", "0.01", "--save-steps", "3")
WORDS += ("--save-total-limit", "9")


def test_a_run_with_noise_is_resumed_exactly(world, here, tmp_path) -> None:
    out = tmp_path / "out"
    words = ("pretrain", *world.args(out, *WORDS, "--embedding-noise", "1"))
    done = here(*words)
    assert done.code == 0, done.stderr
    first = sha256(out)
    for newer in (12, 15, 16):
        shutil.rmtree(out / f"checkpoint-{newer}")
    unfinish(out)
    again = here(*words)
    assert "going on from step 9 of 16" in again.stderr
    assert losses(again.records) == losses(done.records)[9:]
    assert sha256(out) == first


def test_noise_changes_a_run_and_is_part_of_what_it_is(world, here, tmp_path) -> None:
    args = partial(world.args, tmp_path / "noisy", "--max-steps", "2")
    quiet = here("pretrain", *world.args(tmp_path / "quiet", "--max-steps", "2"))
    noisy = here("pretrain", *args("--embedding-noise", "1"))
    assert noisy.code == 0, noisy.stderr
    assert losses(noisy.records) != losses(quiet.records)
    other = here("pretrain", *args("--embedding-noise", "2"))
    assert other.code == 1 and "embedding-noise 1.0" in other.stderr
    run = json.loads(Path(tmp_path / "quiet" / "run.json").read_text())
    assert run["identity"]["embedding_noise"] == 0


def test_evaluation_sees_no_noise(world, here, tmp_path) -> None:
    more = ("--max-steps", "1", "--eval-data", str(world.captions), "--eval-strategy", "steps")
    more += ("--learning-rate", "0", "--warmup-steps", "0")
    found = []
    for noise in ("0", "2"):
        out = tmp_path / noise
        done = here("pretrain", *world.args(out, *more, "--embedding-noise", noise))
        assert done.code == 0, done.stderr
        found.append([r["eval_loss"] for r in done.records if "eval_loss" in r])
    assert found[0] and found[0] == found[1]


def test_every_epoch_has_noise_of_its_own(world, here, tmp_path) -> None:
    steady = replace(world, llama=world.llama_without_dropout)
    more = ("--num-train-epochs", "3", "--per-device-train-batch-size", "16")
    more += ("--learning-rate", "0", "--embedding-noise", "2", "--save-strategy", "no")
    done = here("pretrain", *steady.args(tmp_path / "out", *more))
    assert done.code == 0, done.stderr
    found = [record["grad_norm"] for record in done.records if "grad_norm" in record]
    # the same samples and weights: otherwise they differ by rounding alone
    assert len(found) == 3
    assert min(abs(a - b) for a, b in pairwise(found)) > 5e-5, found

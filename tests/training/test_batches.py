"""Steps: which samples they are made of, and who reads which."""

from __future__ import annotations

import json
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AttentionInterface

from chatbind_cli.data.tokens import TokenizedSample
from chatbind_cli.model.label_loss import IGNORE_INDEX
from chatbind_cli.model.packed_attention import NAME
from chatbind_cli.training.batches import (
    WINDOW,
    Share,
    Step,
    StepSampler,
    StepSamples,
    step_loader,
    tensors,
)
from chatbind_cli.training.noise import EmbeddingNoise
from chatbind_cli.training.packing import Packing
from chatbind_cli.training.samples import Collator
from chatbind_cli.training.watch import Watch
from tests.training.test_resume import unfinish

NO = IGNORE_INDEX


def steps(sampler: StepSampler) -> list[list[int]]:
    return [step.samples for step in sampler]


def test_an_epoch_has_every_sample_once_and_ends_with_the_short_step() -> None:
    random = np.random.default_rng(0)
    for _ in range(100):
        count, per_step = int(random.integers(1, 300)), int(random.integers(1, 40))
        sizes = random.integers(1, 1000, count) if random.integers(2) else None
        sampler = StepSampler(count, per_step, seed=3, sizes=sizes)
        made = steps(sampler)
        assert sorted(chain.from_iterable(made)) == list(range(count))
        assert len(made) == len(sampler)
        assert {len(step) for step in made[:-1]} <= {per_step}
        assert 0 < len(made[-1]) <= per_step
        assert steps(sampler) == made


def test_seed_and_epoch_decide_the_order() -> None:
    first, other = StepSampler(50, 8, seed=0), StepSampler(50, 8, seed=1)
    before = steps(first)
    assert steps(other) != before
    first.epoch = 1
    assert steps(first) != before
    assert {step.epoch for step in first} == {1}


def test_grouped_steps_hold_samples_of_similar_length_in_no_order_of_length() -> None:
    sizes = np.random.default_rng(0).integers(10, 1000, 4 * WINDOW * 8)
    made = [sizes[step] for step in steps(StepSampler(len(sizes), 8, seed=0, sizes=sizes))]
    waste = 1 - sizes.sum() / sum(step.max() * len(step) for step in made)
    assert waste < 0.05
    means = [step.mean() for step in made]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.3


@pytest.mark.parametrize("by_length", [True, False])
def test_processes_share_a_step_without_overlap_in_equally_many_passes(by_length: bool) -> None:
    random = np.random.default_rng(1)
    for _ in range(200):
        sizes = random.integers(1, 500, random.integers(1, 60))
        processes, samples = int(random.integers(1, 6)), int(random.integers(1, 9))
        shares = [
            Share(rank, processes, samples).passes(sizes, by_length=by_length)
            for rank in range(processes)
        ]
        assert len({len(share) for share in shares}) == 1
        assert sorted(chain.from_iterable(chain(*shares))) == list(range(len(sizes)))
        assert max(len(one) for share in shares for one in share) <= samples


def test_processes_read_equally_long_samples_at_a_time() -> None:
    sizes = np.random.default_rng(2).integers(10, 1000, 64)
    shares = [Share(rank, 4, 4).passes(sizes, by_length=True) for rank in range(4)]
    for together in zip(*shares, strict=True):
        longest = [sizes[one].max() for one in together]
        assert max(longest) - min(longest) < 100


class Texts:
    """Samples of the given lengths; each token of a sample is its number."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return self.with_media(indices, [self.tokens(index) for index in indices])

    def tokens(self, index: int) -> TokenizedSample:
        tokens = [int(index) + 1] * self.lengths[index]
        return TokenizedSample(tokens, list(tokens))

    def with_media(
        self, indices: list[int], samples: list[TokenizedSample]
    ) -> list[dict[str, Any]]:
        pairs = zip(indices, samples, strict=True)
        return [{"input_ids": s.input_ids, "labels": s.labels, "number": n} for n, s in pairs]


def made(lengths: list[int], processes: int, packing: Packing | None) -> list[dict[str, Any]]:
    """One step of all samples, as each process sees it."""
    step = Step(0, list(range(len(lengths))))
    return [
        StepSamples(
            Texts(lengths),  # type: ignore[arg-type]
            Collator(0),
            Share(rank, processes, 2),
            np.array(lengths),
            packing=packing,
        ).__getitems__(step)[0]
        for rank in range(processes)
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_hands_on_arrays_of_the_same_batches(workers: int) -> None:
    lengths = [3, 8, 2, 5, 7, 4, 2]
    texts: Any = Texts(lengths)
    samples = StepSamples(texts, Collator(0), Share(samples=2), np.array(lengths))
    order = StepSampler(len(lengths), 4, seed=0)
    for step, found in zip(order, step_loader(samples, order, workers, 0), strict=True):
        [wanted] = samples.__getitems__(step)
        passes = tensors(found["passes"], pin=False)
        assert len(passes) == len(wanted["passes"])
        for batch, handed_on, ours in zip(passes, found["passes"], wanted["passes"], strict=True):
            assert batch.keys() == ours.keys()
            for name, value in ours.items():
                if isinstance(value, torch.Tensor):
                    assert isinstance(handed_on[name], np.ndarray)
                    assert torch.equal(batch[name], value)
                else:
                    assert batch[name] == value


@pytest.mark.parametrize("packing", [None, Packing(tokens=16, row=8, samples=2)])
def test_noise_follows_from_sample_and_epoch_whoever_reads_them(packing: Packing | None) -> None:
    lengths, noise = [3, 8, 2, 5], EmbeddingNoise(1.0, 5, [4])
    rows = {n: torch.full((1, 4), n + 1.0) for n in (0, 1, 3)}  # the third has no media

    class Media(Texts):
        def with_media(self, indices: list[int], samples: Any) -> list[dict[str, Any]]:
            made = super().with_media(indices, samples)
            return [{**sample, "media_embeddings": rows.get(sample["number"])} for sample in made]

    texts: Any = Media(lengths)
    for epoch in (0, 2):
        found: list[torch.Tensor] = []
        for rank in range(2):
            share, sizes = Share(rank, 2, 1), np.array(lengths)
            steps = StepSamples(texts, Collator(0), share, sizes, packing=packing, noise=noise)
            passes = steps.__getitems__(Step(epoch, [3, 2, 1, 0]))[0]["passes"]
            found += [row for batch in passes for row in batch.get("media_embeddings", ())]
        wanted = torch.cat([noise.add(row, n, epoch) for n, row in rows.items()])
        assert {tuple(row.tolist()) for row in found} == {tuple(row.tolist()) for row in wanted}
        assert len(found) == 3


@pytest.mark.parametrize("packing", [None, Packing(tokens=16, row=8, samples=2)])
def test_a_step_has_the_same_labels_whoever_reads_them(packing: Packing | None) -> None:
    lengths = [3, 8, 2, 5, 7, 4, 2]
    wanted = sorted(n + 1 for n, length in enumerate(lengths) for _ in range(length - 1))
    for processes in (1, 2, 3, 5, 9):
        shares = made(lengths, processes, packing)
        assert len({len(share["passes"]) for share in shares}) == 1
        passes = [batch for share in shares for batch in share["passes"]]
        labels = torch.cat([batch["labels"][:, 1:].flatten() for batch in passes])
        assert sorted(labels[labels != NO].tolist()) == wanted
        assert sum(batch["work"].samples for batch in passes) == len(lengths)
        assert sum(batch["work"].labelled for batch in passes) == len(wanted)
        # who has nothing to learn from reads the shortest sample
        idle = [batch for batch in passes if batch["work"].samples == 0]
        assert all(batch["input_ids"].tolist() == [[3, 3]] for batch in idle)
        assert bool(idle) == (processes > len(lengths))


# ---- whole runs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talks(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of many lengths."""
    random = np.random.default_rng(0)
    records = [
        {
            "id": str(n),
            "conversations": [
                {"from": "human", "value": "What is it? " + "red " * int(random.integers(0, 20))},
                {"from": "gpt", "value": "It is " + "blue " * int(random.integers(1, 40))},
            ],
        }
        for n in range(13)
    ]
    path = tmp_path_factory.mktemp("talks") / "talks.json"
    path.write_text(json.dumps(records))
    return path


def words(world: Any, talks: Path, output: Path, *more: str) -> list[str]:
    made = world.args(output, "--num-train-epochs", "2", "--learning-rate", "0.001", *more)
    made[made.index("--data") + 1] = str(talks)
    made[made.index("-m") + 1] = str(world.llama_without_dropout)
    return ["finetune", *made]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model.safetensors")


def test_a_packed_run_learns_what_an_unpacked_one_does(
    world, here, talks, tmp_path, monkeypatch
) -> None:
    packed, apart = tmp_path / "packed", tmp_path / "apart"
    told, attention = [], AttentionInterface._global_mapping[NAME]

    def watched(*states: Any, **options: Any) -> Any:
        told.extend(options.get("sequence_lengths") or [])
        return attention(*states, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, watched)
    done = here(*words(world, talks, packed, "--global-batch-size", "4"))
    assert done.code == 0, done.stderr
    assert [record["step"] for record in done.records[:-1]] == list(range(1, 9))
    assert any(len(row) > 1 and list(row) != [5, 9] for row in told)  # as the trial's are
    assert NAME not in (packed / "config.json").read_text()
    # the number of passes is another, the samples of a step are not
    more = ("--packing", "no", "--gradient-accumulation-steps", "2")
    other = here(*words(world, talks, apart, *more))
    assert other.code == 0, other.stderr
    for one, two in zip(done.records[:-1], other.records[:-1], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["epoch"] == two["epoch"]
    wanted = weights(apart)
    for name, tensor in weights(packed).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-5, msg=name)


def test_a_run_is_grouped_if_it_is_to_be(world, here, talks, tmp_path, monkeypatch) -> None:
    read: list[int] = []
    begin = Watch.begin

    def watched(self: Watch, samples: Any) -> None:
        read.extend(number for one in samples for number in one)
        begin(self, samples)

    monkeypatch.setattr(Watch, "begin", watched)
    for switch in ("no", "yes"):
        more = ("--group-by-length", switch, "--num-train-epochs", "1", "--packing", "no")
        assert here(*words(world, talks, tmp_path / switch, *more)).code == 0
    as_drawn, grouped = read[:13], read[13:]
    assert sorted(as_drawn) == sorted(grouped) == list(range(13))
    lengths = [len(json.dumps(record)) for record in json.loads(talks.read_text())]

    def apart(order: list[int]) -> int:
        pairs = zip(order[0:12:2], order[1:12:2], strict=True)
        return sum(abs(lengths[one] - lengths[other]) for one, other in pairs)

    assert apart(grouped) < apart(as_drawn) / 2


def test_a_run_that_stopped_inside_an_epoch_ends_the_same(world, here, talks, tmp_path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    more = ("--global-batch-size", "4", "--save-steps", "3")
    assert here(*words(world, talks, whole, *more)).code == 0
    # as a kill leaves it after step 6, the second of the second epoch
    shutil.copytree(whole, out)
    unfinish(out, "checkpoint-3", "checkpoint-6")
    again = here(*words(world, talks, out, *more))
    assert again.code == 0, again.stderr
    assert [record.get("step") for record in again.records] == [7, 8, None]
    wanted = weights(whole)
    for name, tensor in weights(out).items():
        assert torch.equal(tensor, wanted[name]), name


def test_workers_make_the_same_batches(world, here, talks, tmp_path) -> None:
    losses = []
    for workers in ("0", "2"):
        more = ("--dataloader-num-workers", workers, "--max-steps", "5")
        done = here(*words(world, talks, tmp_path / workers, *more))
        assert done.code == 0, done.stderr
        losses.append([record["loss"] for record in done.records[:-1]])
    assert losses[0] == losses[1]

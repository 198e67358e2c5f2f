"""What a language model adds to its loss counts once a step, however the step is split."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, MixtralConfig, MixtralForCausalLM


@pytest.fixture(scope="module")
def mixtral(world, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral") / "lm"
    shutil.copytree(world.llama, folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=AutoConfig.from_pretrained(world.llama).vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=50.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def losses(
    here, world, mixtral: Path, out: Path, size: int, passes: int, *more: str
) -> list[float]:
    words = world.args(out, "--max-steps", "2", "--learning-rate", "0.001", *more)
    words[words.index("-m") + 1] = str(mixtral)
    words[words.index("--per-device-train-batch-size") + 1] = str(size)
    words[words.index("--gradient-accumulation-steps") + 1] = str(passes)
    done = here("finetune", *words, "--packing", "no")
    assert done.code == 0, done.stderr
    return [record["loss"] for record in done.records if "loss" in record and "step" in record]


@pytest.mark.parametrize("at_labels", ["yes", "no"])
def test_a_router_s_loss_counts_once_a_step(
    world, here, mixtral, tmp_path: Path, at_labels: str
) -> None:
    more = ("--loss-at-labels", at_labels)
    one = losses(here, world, mixtral, tmp_path / "one", 8, 1, *more)
    four = losses(here, world, mixtral, tmp_path / "four", 2, 4, *more)
    # two experts a token of four: at its least the router's part is 2 times its weight of 50; over
    # a fourth of the tokens it is a little more
    assert 100 < one[0] < 120
    assert four[0] == pytest.approx(one[0], rel=0.03)


def test_held_out_loss_is_of_the_words_alone(world, here, mixtral, tmp_path: Path) -> None:
    words = ("--eval-data", str(world.instructions), "--evaluation-strategy", "steps")
    out = tmp_path / "out"
    losses(here, world, mixtral, out, 8, 1, *words)
    records = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    measured = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert measured
    assert all(4 < loss < 7 for loss in measured)

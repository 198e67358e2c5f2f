"""Several processes under the real launchers do what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

# 16 samples, 4 a step, in a language model without dropout: processes draw different random
# numbers, and everything else is the same but for the order in which sums are rounded
STEP = ("--num-train-epochs", "2", "--save-steps", "3", "--learning-rate", "0.01")


def words(world, output: Path, samples: int, *, source: str) -> list[str]:
    made = world.args(output, *STEP, source=source)
    made[made.index("-m") + 1] = str(world.llama_without_dropout)
    made[made.index("--per-device-train-batch-size") + 1] = str(samples)
    return made


def assert_alike(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=3e-5, msg=name)


def test_two_launched_processes_train_like_one(world, here, program, tmp_path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert here("pretrain", *words(world, one, 4, source="media")).code == 0
    # with one sample a process and pass, some passes of one process have text only
    launched = words(world, two, 1, source="media")
    launched[launched.index("--gradient-accumulation-steps") + 1] = "2"
    done = program("pretrain", *launched, "--num-processes", "2")
    assert done.code == 0, done.stderr
    assert [record["step"] for record in done.records[:-1]] == list(range(1, 9))
    assert done.records[-1]["artifact"] == "checkpoint"
    # both have encoded their share
    parts = sorted((two / "embeddings").iterdir())
    assert [part.name for part in parts] == ["part-00000", "part-00001"]
    assert_alike(one / "projector.safetensors", two / "projector.safetensors")
    # what one process made, two go on with: it is finished
    again = here("pretrain", *words(world, two, 4, source="media"))
    assert again.records == done.records[-1:]


def test_torchrun_starts_the_same_command(world, here, tmp_path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert here("finetune", *words(world, one, 2, source="store")).code == 0
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--standalone", "--nproc_per_node=2", "-m", "chatbind_cli", "finetune"),
            *words(world, two, 1, source="store"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 17
    assert_alike(one / "model.safetensors", two / "model.safetensors")

"""What is found before a run begins, and what it is said to need."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from chatbind_cli.training import preflight
from chatbind_cli.training.needs import GIB, Shape, advice, disk_needed, memory_needed
from chatbind_cli.training.settings import TrainingSettings

# LLaMA-7B, as its config.json and weights say
LLAMA = Shape(numbers=6_738_415_616, adapted=2_490_368, layers=32, width=4096, vocabulary=32_000)
# tests/e2e runs elsewhere; here nothing is read
SOME = {"model": Path("m"), "data": Path("d"), "output": Path("o")}


def settings(stage: str = "finetune", **values) -> TrainingSettings:
    return TrainingSettings(stage=stage, **SOME, **values)  # type: ignore[arg-type]


def test_a_7b_needs_what_arithmetic_says() -> None:
    needs = memory_needed(settings(), LLAMA, tokens=2048, half=True)
    # 16 bytes a number, and the half-precision copies of autocast
    assert (needs.weights + needs.training) / GIB == pytest.approx(100.4 + 12.6, abs=0.1)
    assert 5 < needs.activations / GIB < 15
    shared = memory_needed(settings(), LLAMA, tokens=2048, half=True, shards=4)
    # a quarter, the ends and two layers in half precision, and the ends' gradients while summed
    ends, layer = 2 * 32_000 * 4096, 0.2024e9
    whole = (2 * (ends + 2 * layer) + 6 * ends) / GIB
    assert (shared.weights + shared.training) / GIB == pytest.approx(25.1 + whole, abs=0.1)
    frozen = memory_needed(settings("pretrain"), LLAMA, tokens=2048, half=True)
    assert frozen.weights / GIB == pytest.approx(12.6, abs=0.1)
    assert frozen.training == 0
    saving = memory_needed(settings(gradient_checkpointing=True), LLAMA, tokens=2048, half=True)
    assert saving.activations < needs.activations / 5


def test_disk_is_for_result_and_checkpoints() -> None:
    result, checkpoint = disk_needed(settings(), LLAMA, half=False)
    assert (round(result / 1e9), round(checkpoint / 1e9)) == (27, 81)
    assert disk_needed(settings("pretrain"), LLAMA, half=False) == (0, 0)


def test_advice_is_the_first_thing_that_helps() -> None:
    def ask(gib: float, gpus: int = 1, **values) -> str | None:
        told = {"tokens": 16 * 2048, "half": True, "room": gib * GIB, "gpus": gpus}
        return advice(settings(**values), LLAMA, **told)

    assert ask(140) == "--gradient-checkpointing yes"
    assert ask(116) == "--per-device-train-batch-size 1 and --gradient-checkpointing yes"
    assert ask(60, gpus=4) == '--fsdp "full_shard auto_wrap" over 4 GPUs'
    assert ask(20) == "--lora-r 64"
    assert ask(10, stage="pretrain") is None


def test_adapters_need_little_beside_a_small_frozen_model() -> None:
    def need(**values):
        return memory_needed(settings(lora_r=64, **values), LLAMA, tokens=2048, half=True)

    adapters = 64 * LLAMA.adapted
    assert need().training == adapters * 12
    assert need().weights == LLAMA.numbers * 2 + adapters * 6
    assert need(load_in_4bit=True).weights < need().weights / 2
    # the folder, and a checkpoint with the optimizer's averages
    assert disk_needed(settings(lora_r=64), LLAMA, half=True) == (adapters * 4, adapters * 12)

    def ask(gib: float, gpus: int, **values) -> str | None:
        told = {"tokens": 4 * 2048, "half": True, "room": gib * GIB, "gpus": gpus}
        return advice(settings(lora_r=64, **values), LLAMA, **told)

    assert ask(14, gpus=8) == '--fsdp "full_shard auto_wrap" over 8 GPUs'
    assert ask(14, gpus=1) == "--load-in-4bit"
    assert ask(14, gpus=0) is None
    assert ask(5, gpus=8, load_in_4bit=True) is None


def test_shapes_are_read_off_the_weights() -> None:
    shapes = {"model.layers.0.q.weight": (6, 4), "model.norm.weight": (4,), "head": (10, 4)}
    config = {"text_config": {"num_hidden_layers": 1, "hidden_size": 4}, "vocab_size": 10}
    assert Shape.of(config, shapes) == Shape(24 + 4 + 40, 10, 1, 4, 10)


def test_a_full_disk_is_told_before_training(world, here, tmp_path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    words = world.args(tmp_path / "out", "--max-steps", "1")
    failed = here("finetune", *words)
    assert failed.code == 1
    assert "has 0.0 GiB free" in failed.stderr
    assert not (tmp_path / "out").exists()
    # stage 1 saves next to nothing
    assert here("pretrain", *words).code == 0


def test_too_little_memory_is_told(world, here, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("chatbind_cli.training.preflight.memory", lambda: (1, 1))
    done = here("finetune", *world.args(tmp_path / "out", "--max-steps", "1"))
    assert done.code == 0, done.stderr
    assert "a process needs about 0.0 GiB: " in done.stderr
    assert "try --lora-r 64" in done.stderr


def test_all_media_are_looked_at_where_told(world, here, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("chatbind_cli.training.preflight._MEDIA", 4)
    media = tmp_path / "media"
    shutil.copytree(world.media, media)
    (media / "p1.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    words = world.args(tmp_path / "out", "--max-steps", "1", source="media")
    words[words.index("--media-root") + 1] = str(media)
    # every other medium: this one is found later, once the run's folder is there
    late = here("pretrain", *words)
    assert late.code == 1
    assert (tmp_path / "out" / "rejected.jsonl").exists()
    shutil.rmtree(tmp_path / "out")
    early = here("pretrain", *words, "--check", "all")
    assert early.code == 1
    assert "p1.png" in early.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_that_could_learn_nothing_is_refused(world, here, tmp_path) -> None:
    done = here("finetune", *world.args(tmp_path / "out", "--model-max-length", "16"))
    assert done.code == 1
    assert "all samples are cut before their first answer at 16 tokens" in done.stderr


@pytest.mark.parametrize(
    ("chosen", "gpus", "told"),
    [
        (None, 1, ", and so activations will be computed twice"),
        (None, 0, ": try --gradient-checkpointing yes"),
        (False, 1, ": try --gradient-checkpointing yes"),
    ],
)
def test_what_the_first_step_will_decide_needs_no_advice(
    chosen: bool | None, gpus: int, told: str, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(preflight, "_gpu_memory", lambda: 150 * GIB)
    monkeypatch.setattr(preflight, "memory", lambda: (150 * GIB, 150 * GIB))
    run = settings(gradient_checkpointing=chosen, per_device_train_batch_size=16)
    preflight._look_at_memory(run, LLAMA, 2048, half=True, gpus=gpus)
    assert told in capsys.readouterr().err

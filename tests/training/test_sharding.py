"""A model shared out over two processes trains, goes on and is written as one that is not."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from chatbind_cli.cli import run
from chatbind_cli.errors import UsageError
from chatbind_cli.training import run as training
from chatbind_cli.training.settings import TrainingSettings
from chatbind_cli.training.sharded_trainer import ShardedTrainer
from chatbind_cli.training.sharding import Sharding, sharding_of
from tests.training.test_resume import unfinish

FSDP = ("--fsdp", "full_shard auto_wrap")
# sums in another order, and what AdamW makes of gradients that are nearly zero
ROUNDING = 2e-6
LORA = ("--lora-r", "4", "--lora-alpha", "8", "--lora-dropout", "0")
HALF = ("--bf16", "yes", "--gradient-checkpointing", "yes")


def words(world: Any, out: Path, *more: str, model: Path, processes: int = 2) -> list[str]:
    """Four steps of four samples; of two processes each takes a sample at a time."""
    steps = ("--max-steps", "4", "--save-steps", "2", "--learning-rate", "0.01")
    made = ["finetune", *world.args(out, *steps, *more)]
    made[made.index("-m") + 1] = str(model)
    made[made.index("--per-device-train-batch-size") + 1] = str(4 // processes**2)
    made[made.index("--gradient-accumulation-steps") + 1] = str(processes)
    return made


def together(work: Callable[[int], None], folder: Path) -> None:
    """Does the work in two processes that meet over gloo; forks, which need not import it all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def one(rank: int) -> None:
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        os.environ.update(place)
        try:
            work(rank)
        except BaseException:
            (folder / f"failed-{rank}").write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)

    forks = multiprocessing.get_context("fork")
    children = [forks.Process(target=one, args=(rank,)) for rank in (0, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, from Python 3.12 on
        for child in children:
            child.start()
    while all(child.exitcode is None for child in children):
        children[0].join(0.1)
    for child in children:
        # a process whose other one has failed may wait for it
        child.join(60 if all(c.exitcode in (None, 0) for c in children) else 1)
        child.kill()
    assert not [file.read_text() for file in sorted(folder.glob("failed-*"))]


def interrupted(made: Path, copy: Path) -> Path:
    """A copy of a finished run, as if it had been killed after its second step."""
    shutil.copytree(made, copy)
    unfinish(copy, "checkpoint-2")
    return copy


def watch(notes: Path) -> None:
    """Notes where this process's model lay before it was shared out, and each pass's gradients."""
    seen: dict[str, Any] = {"passes": []}
    shard, step = training.shard, ShardedTrainer.training_step

    def watched_shard(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        seen["before"] = sorted({t.device.type for t in (*model.parameters(), *model.buffers())})
        shard(model, *args, **kwargs)

    def watched_step(self: ShardedTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(self, *args, **kwargs)
        parameters = list(self.trained.parameters())
        parts = [p.grad.to_local().flatten() for p in parameters if p.grad is not None]
        held, rounded = torch.cat(parts), float(loss.bfloat16()) == float(loss)
        share = held.numel() / sum(p.numel() for p in parameters)
        rough = torch.equal(held.bfloat16().float(), held)
        seen["passes"].append({"share": share, "rough": rough, "rounded": rounded})
        notes.write_text(json.dumps(seen))
        return loss

    training.shard, ShardedTrainer.training_step = watched_shard, watched_step


@pytest.fixture(scope="module")
def tied(world, tmp_path_factory) -> Path:
    """A language model without dropout, whose input and output embeddings are one."""
    folder = tmp_path_factory.mktemp("tied") / "llama"
    shutil.copytree(world.llama_without_dropout, folder)
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(folder, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(world, tied, tmp_path_factory) -> Path:
    """Runs of two processes; `whole` and `adapters` are not shared out."""
    root = tmp_path_factory.mktemp("runs")

    def work(rank: int) -> None:
        from accelerate import PartialState

        def go(name: str, *more: str, model: Path, again: str | None = None) -> None:
            if again is not None and rank == 0:
                interrupted(root / again, root / name)
            PartialState().wait_for_everyone()
            code, message = run(words(world, root / name, *more, model=model))
            assert code == 0, f"{name}: {message}"

        go("whole", model=tied)
        go("shared", *FSDP, model=tied)
        go("shared-again", *FSDP, model=tied, again="shared")
        go("whole-then-shared", *FSDP, model=tied, again="whole")
        go("adapters", *LORA, model=world.llama_without_dropout)
        go("shared-adapters", *FSDP, *LORA, model=world.llama_without_dropout)
        watch(root / f"seen-{rank}.json")
        more = [*FSDP, *HALF, "--eval-data", str(world.captions), "--eval-strategy", "steps"]
        go("half", *more, model=world.llama)
        go("half-again", *more, model=world.llama, again="half")

    together(work, root)
    return root


def same(one: Path, other: Path, tolerance: float) -> None:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=tolerance, msg=name)


def losses(run_folder: Path) -> list[float]:
    records = map(json.loads, (run_folder / "log.jsonl").read_text().splitlines())
    return [record.get("loss", record.get("eval_loss")) for record in records]


def test_a_shared_model_trains_like_a_whole_one(runs) -> None:
    same(runs / "whole", runs / "shared", ROUNDING)
    assert losses(runs / "whole") == pytest.approx(losses(runs / "shared"), abs=1e-5)


def test_adapters_train_in_two_processes_as_in_one_and_beside_a_shared_model(
    world, here, runs, tmp_path
) -> None:
    line = words(world, tmp_path / "one", *LORA, model=world.llama_without_dropout, processes=1)
    assert here(*line).code == 0
    for name in ("adapter_model.safetensors", "projector.safetensors"):
        one = load_file(tmp_path / "one" / name)
        for run_of_two in ("adapters", "shared-adapters"):
            other = load_file(runs / run_of_two / name)
            assert one.keys() == other.keys()
            for key, tensor in one.items():
                torch.testing.assert_close(other[key], tensor, rtol=0, atol=ROUNDING, msg=key)


@pytest.mark.parametrize(("first", "again"), [("shared", "shared-again"), ("half", "half-again")])
def test_it_goes_on_bit_for_bit(runs, first, again) -> None:
    assert (runs / again / "checkpoint-4" / "shards").is_dir()
    same(runs / first, runs / again, 0)
    assert losses(runs / first) == losses(runs / again)


def test_one_process_goes_on_where_two_were(world, tied, here, runs, tmp_path) -> None:
    out = interrupted(runs / "shared", tmp_path / "one")
    done = here(*words(world, out, model=tied, processes=1))
    assert done.code == 0, done.stderr
    assert "going on from step 2 of 4" in done.stderr
    same(runs / "shared", out, ROUNDING)


def test_a_run_is_shared_out_from_its_middle_on(runs) -> None:
    assert (runs / "whole-then-shared" / "checkpoint-2" / "optimizer.pt").exists()
    assert (runs / "whole-then-shared" / "checkpoint-4" / "shards").is_dir()
    same(runs / "shared", runs / "whole-then-shared", ROUNDING)


def test_only_the_first_process_holds_weights_before(runs) -> None:
    before = [json.loads((runs / f"seen-{rank}.json").read_text())["before"] for rank in (0, 1)]
    assert before == [["cpu"], ["meta"]]


def test_gradients_are_shared_out_and_exact_after_every_pass(runs) -> None:
    passes = json.loads((runs / "seen-1.json").read_text())["passes"]
    assert len(passes) == 12  # of four steps, and then of two
    for seen in passes:
        assert 0.4 < seen["share"] < 0.6
        assert not seen["rough"]  # as sums in bfloat16 would be
    assert not all(seen["rounded"] for seen in passes)


def test_tied_weights_are_written_once(runs) -> None:
    untied, once = (load_file(runs / name / "model.safetensors") for name in ("half", "shared"))
    assert untied.keys() - once.keys() == {"language_model.lm_head.weight"}


@pytest.fixture
def settings(tmp_path: Path) -> TrainingSettings:
    return TrainingSettings(
        stage="finetune", model=tmp_path, data=tmp_path, output=tmp_path, fsdp=FSDP[1]
    )


def test_the_words_of_sharding(settings) -> None:
    assert sharding_of(settings, 2) == Sharding()
    layers = ("LlamaDecoderLayer",)
    kept = replace(settings, fsdp="shard_grad_op", fsdp_layers=layers)
    assert sharding_of(kept, 2) == Sharding(reshard=False, layers=layers)
    assert sharding_of(replace(settings, fsdp=""), 2) is None


@pytest.mark.parametrize(
    ("change", "world_size", "told"),
    [
        ({}, 1, "--fsdp has no effect: there is one process"),
        ({"stage": "pretrain"}, 2, "--fsdp has no effect: the projector alone trains"),
        ({"freeze_backbone": True}, 2, "--fsdp has no effect: the projector alone trains"),
    ],
)
def test_sharding_without_effect_is_said(settings, capsys, change, world_size, told) -> None:
    assert sharding_of(replace(settings, **change), world_size) is None
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"fsdp": "half_shard"}, "--fsdp does not know 'half_shard'"),
        ({"fsdp": "full_shard offload"}, "--fsdp offload is not supported"),
        ({"fp16": True}, "not with --fp16"),
        ({"lora_r": 4, "load_in_4bit": True}, "not with --load-in-4bit"),
    ],
)
def test_sharding_that_cannot_be_is_refused(settings, change, told) -> None:
    with pytest.raises(UsageError, match=told):
        replace(settings, **change)

"""Switches of speed change a run by rounding only."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration
from chatbind_cli.training import trainer
from chatbind_cli.training.compiling import compile_layers
from chatbind_cli.training.prefix import SharedPrefix
from tests.training.conftest import Outcome, World
from tests.training.test_prefix import chatbind, collator, results, samples

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


def test_in_bfloat16_a_run_differs_by_rounding(run: Any) -> None:
    fast, _, told = run("pretrain", "--bf16", "yes")
    plain, _, _ = run("pretrain", "--bf16", "yes", *PLAIN)
    assert "has no effect" not in told
    for one, other in zip(fast, plain, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=5e-3), one["step"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=3e-2), one["step"]


def test_an_evaluation_has_the_plain_loss(world: World, run: Any) -> None:
    words = ("--eval-data", str(world.instructions), "--eval-strategy", "steps")
    words += ("--eval-steps", "4")
    outcomes = [run("pretrain", *words, *more) for more in ((), PLAIN)]
    losses = [[r["eval_loss"] for r in log if "eval_loss" in r] for log, _, _ in outcomes]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
# the compiler looks at every attribute of a tensor, and silences what that says on its own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_layers_compute_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    model = chatbind("llama")
    batch = SharedPrefix(model, nullcontext, wanted=True).cut(collator(model)(samples()))
    cache = copy.deepcopy(batch["past_key_values"])
    loss, wanted = results(model, **batch)
    # code is traced and guarded as for any backend, but not translated
    compile_layers(model.language_model, backend="eager")
    got, gradients = results(model, **{**batch, "past_key_values": cache})
    torch.testing.assert_close(got, loss, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=2e-5, atol=1e-6, msg=name)
    assert not capsys.readouterr().err


def test_without_a_compiler_nothing_is_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    model = chatbind("llama")
    compile_layers(model.language_model, backend="no_such_backend")
    assert "--compile has no effect: nothing compiles here" in capsys.readouterr().err


def test_the_fused_optimizer_is_the_plain_one() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(50), [torch.randn(50) for _ in range(5)]
    ends = []
    for fused in (True, False):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1, fused=fused)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        ends.append(parameter.detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)
    assert TrainingArguments("unused", use_cpu=True).optim == "adamw_torch_fused"


def test_the_switches_reach_the_model(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    compiled: list[Any] = []
    forward = ChatBindForConditionalGeneration.forward

    def watched(self: Any, *args: Any, **inputs: Any) -> Any:
        if torch.is_grad_enabled():  # no trial
            seen.append({name for name, value in inputs.items() if value is not None})
        return forward(self, *args, **inputs)

    monkeypatch.setattr(ChatBindForConditionalGeneration, "forward", watched)
    monkeypatch.setattr(trainer, "compile_layers", compiled.append)
    run("pretrain", "--compile", "yes")
    fast, seen = seen, []
    assert fast
    assert all({"past_key_values", "label_positions"} <= names for names in fast)
    assert len(compiled) == 1
    run("pretrain", *PLAIN)
    assert seen
    assert not any({"past_key_values", "label_positions"} & names for names in seen)
    assert len(compiled) == 1

"""The loss at labels alone is the loss: of any language model, with all its gradients."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    Qwen3Config,
)

from chatbind_cli.model import label_loss
from chatbind_cli.model.chatbind import ChatBindConfig, ChatBindForConditionalGeneration
from chatbind_cli.model.label_loss import linear_loss, loss_way
from tests.model.tiny import SIZES, language_model

PATCH = 97


def made(kind: str) -> Any:
    torch.manual_seed(0)
    others = {
        "qwen3": lambda: Qwen3Config(**SIZES),
        "gemma2": lambda: Gemma2Config(**SIZES, final_logit_softcapping=3.0),
        "granite": lambda: GraniteConfig(**SIZES, logits_scaling=4.0),
        "cohere": lambda: CohereConfig(**SIZES, logit_scale=0.5),
    }
    if kind in others:
        return AutoModelForCausalLM.from_config(others[kind]())
    if kind == "mixtral_router":
        model = language_model("mixtral")
        model.config.output_router_logits = True
        model.config.router_aux_loss_coef = 0.5
        return model
    return language_model(kind)


WAYS = {
    "llama": "linear",
    "qwen2_tied": "linear",
    "qwen3": "linear",
    "gpt_neox": "linear",
    "opt": "linear",
    "bloom": "linear",
    "gpt2": "linear",
    "mixtral": "linear",
    "gemma2": "own",
    "granite": "own",
    "cohere": "own",
    "mixtral_router": "own",
}


def chatbind(kind: str) -> ChatBindForConditionalGeneration:
    base = made(kind)
    config = ChatBindConfig(text_config=base.config, im_patch_id=PATCH, embedding_dim=8)
    return ChatBindForConditionalGeneration(config, base)


def batch() -> dict[str, torch.Tensor]:
    """Three rows: two media, one, none; padding; labels in several stretches."""
    torch.manual_seed(1)
    ids = torch.randint(1, 90, (3, 12))
    ids[0, [2, 6]] = ids[1, 4] = PATCH
    mask = torch.ones_like(ids)
    mask[1, 9:] = mask[2, 7:] = 0
    labels = torch.full_like(ids, -100)
    labels[0, 4:6], labels[0, 8:] = ids[0, 4:6], ids[0, 8:]
    labels[1, 5:9], labels[2, 1:7] = ids[1, 5:9], ids[2, 1:7]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "media_embeddings": torch.randn(3, 8),
    }


def positions(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = []
    for row in range(len(inputs["labels"])):
        for column in range(1, inputs["labels"].shape[1]):
            if inputs["labels"][row, column] != -100:
                found.append(row * inputs["labels"].shape[1] + column - 1)
    places = (inputs["input_ids"] == PATCH).flatten().nonzero().squeeze(1)
    return {"label_positions": torch.tensor(found), "media_positions": places}


def results(model: Any, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("items", [None, 40])
def test_loss_and_gradients_are_the_plain_ones(kind: str, items: int | None) -> None:
    model, inputs = chatbind(kind).eval(), batch()
    if items is not None:
        inputs["num_items_in_batch"] = torch.tensor(items)
    plain, wanted = results(model, **inputs)
    got, gradients = results(model, **inputs, **positions(inputs))
    assert model.loss_way == WAYS[kind]
    torch.testing.assert_close(got, plain, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_no_logits_are_made_elsewhere(kind: str) -> None:
    model, inputs = chatbind(kind), batch()
    model.find_loss_way()
    rows: list[int] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: rows.append(out.numel() // 100))
    output = model(**inputs, **positions(inputs))
    assert rows == [int((inputs["labels"][:, 1:] != -100).sum())]
    assert output.logits is None


def test_a_small_loss_of_routers_is_seen() -> None:
    model = made("mixtral_router")
    model.config.router_aux_loss_coef = 1e-3  # the usual one
    assert loss_way(model, 32) == "own"


def test_finding_the_way_leaves_no_trace() -> None:
    model = made("gemma2").train()
    kernels = model.config._attn_implementation
    state = torch.random.get_rng_state()
    assert loss_way(model, 32) == "own"
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert model.config._attn_implementation == kernels
    assert not model.get_decoder()._forward_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_way_is_the_same_in_bfloat16(dtype: torch.dtype) -> None:
    assert loss_way(made("llama").to(dtype), 32) == "linear"
    assert loss_way(made("granite").to(dtype), 32) == "own"


def test_a_model_that_goes_other_ways_is_computed_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = chatbind("llama"), batch()
    whole = model.language_model.forward

    def other(shift_labels: Any = None, **kwargs: Any) -> Any:  # it shifts whatever it gets
        output = whole(**kwargs)
        output.loss = output.loss * 2
        return output

    wanted = model(**inputs).loss
    model.loss_way = "plain"
    torch.testing.assert_close(model(**inputs, **positions(inputs)).loss, wanted)
    monkeypatch.setattr(model.language_model, "forward", other)
    assert loss_way(model.language_model, 32) == "plain"


def test_many_labels_are_done_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head, states = torch.nn.Linear(8, 50), torch.randn(23, 8, requires_grad=True)
    targets = torch.randint(0, 50, (23,))
    whole = linear_loss(states, head, targets, None)
    wanted = torch.autograd.grad(whole, [states, *head.parameters()])
    monkeypatch.setattr(label_loss, "_LOGITS", 50 * 5)
    sizes: list[int] = []
    head.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    pieces = linear_loss(states, head, targets, None)
    assert sizes == [5, 5, 5, 5, 3]
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=0)
    got = torch.autograd.grad(pieces, [states, *head.parameters()])
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_a_batch_without_labels_has_loss_zero_and_gradients() -> None:
    model, inputs = chatbind("llama").train(), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    nothing = {"label_positions": torch.zeros(0, dtype=torch.long)}
    loss, gradients = results(model, **inputs, **nothing, num_items_in_batch=torch.tensor(0))
    assert loss == 0
    assert all(g.abs().max() == 0 for g in gradients.values())
    assert any(name.startswith("projector") for name in gradients)


@pytest.mark.parametrize("autocast", [False, True])
def test_ligers_kernel_is_handed_what_the_layer_would_compute_with(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fused(torch.nn.Module):
        def __init__(self, reduction: str) -> None:
            super().__init__()
            self.reduction = reduction

        def forward(self, lin_weight: Any, _input: Any, target: Any, bias: Any = None) -> Any:
            assert lin_weight.dtype == (torch.bfloat16 if autocast else torch.float32)
            logits = functional.linear(_input, lin_weight, bias).float()
            return functional.cross_entropy(logits, target, reduction=self.reduction)

    liger = types.ModuleType("liger_kernel.transformers")
    liger.LigerFusedLinearCrossEntropyLoss = Fused  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    torch.manual_seed(0)
    head, states = torch.nn.Linear(8, 50), torch.randn(7, 8, requires_grad=True)
    targets = torch.randint(0, 50, (7,))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = linear_loss(states, head, targets, torch.tensor(3))
        monkeypatch.setattr(label_loss, "_fused", lambda *given: True)
        fused = linear_loss(states, head, targets, torch.tensor(3))
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=0)
    both = [torch.autograd.grad(loss, [states, *head.parameters()]) for loss in (fused, plain)]
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)

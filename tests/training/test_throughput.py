"""What counts as work, and how its rates are told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration
from chatbind_cli.model.config import ChatBindConfig
from chatbind_cli.training.stages import select_trainable
from chatbind_cli.training.throughput import Meter, ModelFlops, Work, peak_flops

SIZES = {
    "vocab_size": 50,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}


def model(language_model) -> ChatBindForConditionalGeneration:
    config = ChatBindConfig(text_config=language_model.config, embedding_dim=4)
    return ChatBindForConditionalGeneration(config, language_model)


def test_work_leaves_out_the_prefix_but_what_looks_at_it() -> None:
    assert Work.of([5, 3], labelled=4) == (2, 8, 4, 15 + 6)
    # the pairs inside the first two positions are gone, and no others
    assert Work.of([5, 3], labelled=4).without_prefix(2) == (2, 4, 4, 15 + 6 - 2 * 3)


def test_operations_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    one = model(LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager")))
    select_trainable(one, "finetune")
    ids = torch.randint(0, 50, (2, 7))
    with FlopCounterMode(display=False) as counted:
        logits = one.language_model(input_ids=ids).logits
        logits.sum().backward()
    flops = ModelFlops.of(one)
    assert flops.passes == 3
    # the plain computation has logits everywhere, and looks at all pairs: 49 and not 28 a sample;
    # the projector, of which a medium passes once, is not in it
    projector = sum(p.numel() for p in one.projector.parameters() if p.dim() > 1)
    without = ModelFlops(flops.body - projector, flops.head, flops.attention, 3)
    assert without(Work(2, 14, 14, 2 * 49)) == counted.get_total_flops()


def test_a_frozen_language_model_has_no_gradients_of_weights() -> None:
    one = model(LlamaForCausalLM(LlamaConfig(**SIZES)))
    select_trainable(one, "pretrain")
    assert ModelFlops.of(one).passes == 2


def test_of_experts_only_the_active_count() -> None:
    def body(experts: int) -> int:
        config = MixtralConfig(
            **SIZES, num_key_value_heads=2, num_local_experts=experts, num_experts_per_tok=2
        )
        return ModelFlops.of(model(MixtralForCausalLM(config))).body

    # but for the router, which has a row for each expert in each of three layers
    assert body(8) - body(2) == 3 * 6 * 8


def test_rates_are_shares_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0])
    # its own name alone: other threads of this process go by the real clock
    own = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr("chatbind_cli.training.throughput.time", own)
    meter = Meter(ModelFlops(body=10, head=5, attention=2, passes=3), peak=100.0)
    assert list(meter.waiting(iter(["batch"])))[:1] == ["batch"]
    meter.add(Work(4, 30, 10, 100))
    rates = meter.rates(meter.counts(), processes=1)
    assert rates["samples_per_s"] == 2
    assert rates["tokens_per_s"] == 15
    assert rates["data_wait"] == 0.25
    assert rates["mfu"] == pytest.approx((6 * (300 + 50) + 12 * 2 * 100) / 200)
    assert meter.counts() == [0, 0, 0, 0, 0]


def test_the_peak_of_a_cpu_is_not_known() -> None:
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None

"""Packed rows: nothing is lost, nothing is too long, and the model learns the same from them."""

from __future__ import annotations

from copy import deepcopy
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    FalconMambaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    TrainerState,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from chatbind_cli.model.chatbind import ChatBindConfig, ChatBindForConditionalGeneration
from chatbind_cli.model.label_loss import IGNORE_INDEX
from chatbind_cli.model.packed_attention import NAME, packed_rows, read_by_sequence
from chatbind_cli.training.batches import Steps
from chatbind_cli.training.checkpointing import recompute
from chatbind_cli.training.packing import Packing, first_fit, packs_exactly
from chatbind_cli.training.samples import Collator

PATCH = 99
SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,  # so that attention, too, has a say
    "attn_implementation": "sdpa",
}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gpt_neox": GPTNeoXConfig(**{**SIZES, "hidden_dropout": 0.0}),
    "mistral": MistralConfig(**SIZES, sliding_window=4),
    "eager": LlamaConfig(**{**SIZES, "attn_implementation": "eager"}),
}


def chatbind(config: Any) -> ChatBindForConditionalGeneration:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(deepcopy(config))  # which a model may change
    wrapped = ChatBindConfig(text_config=base.config, im_patch_id=PATCH, embedding_dim=8)
    return ChatBindForConditionalGeneration(wrapped, base).train()


def a_step() -> list[dict[str, Any]]:
    """Samples of several lengths, the media in places of their own, one without any."""
    random = np.random.default_rng(1)
    samples = []
    for length in (3, 17, 9, 2, 12, 9, 6):
        ids = random.integers(1, PATCH, length).tolist()
        labels = [IGNORE_INDEX if random.random() < 0.4 else token for token in ids]
        media = None
        if length > 2:
            ids[length // 2], labels[length // 2] = PATCH, IGNORE_INDEX
            media = torch.from_numpy(random.standard_normal((1, 8), dtype=np.float32))
        samples.append({"input_ids": ids, "labels": labels, "media_embeddings": media})
    samples[0]["labels"] = list(samples[0]["input_ids"])  # its first label has nothing before it
    return samples


def learned(model: ChatBindForConditionalGeneration, batches: list[dict[str, Any]]) -> Any:
    """The loss of a step, and the gradients of all parameters."""
    model.zero_grad()
    labelled = sum(batch["work"].labelled for batch in batches)
    total = 0.0
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name not in ("work", "samples")}
        loss = model(**inputs, num_items_in_batch=labelled).loss
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("one_row", [True, False])
def test_a_packed_step_teaches_what_a_padded_one_does(kind: str, one_row: bool) -> None:
    model, samples = chatbind(MODELS[kind]), a_step()
    lengths = np.array([len(sample["input_ids"]) for sample in samples])
    packing = Packing(tokens=40, row=24, one_row=one_row, attention=1e6)
    shares = list(chain.from_iterable(packing.passes(lengths, 1)))
    assert any(len(row) > 1 for rows in shares for row in rows)
    packed = [Collator(0, 8).packed([[samples[n] for n in row] for row in rows]) for rows in shares]
    loss, gradients = learned(model, packed)
    wanted_loss, wanted = learned(model, [Collator(0)(samples)])
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = (gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-9)
        assert error < 3e-6, name


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox", "mistral"])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_attention_by_sequence_teaches_the_same(kind: str, twice: bool, half: bool) -> None:
    model, samples = chatbind(MODELS[kind]), a_step()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        wanted_loss, wanted = learned(model, [Collator(0)(samples)])
        assert read_by_sequence(model.language_model, on=True)
        if twice:
            recompute(model)
        rows = Collator(0, 8).packed([samples[:3], samples[3:5], samples[5:]])
        loss, gradients = learned(model, [rows])
        padded, _ = learned(model, [Collator(0)(samples)])  # goes the old way
    assert loss == pytest.approx(wanted_loss, rel=1e-2 if half else 1e-6)
    assert padded == wanted_loss
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = (gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-9)
        assert error < (3e-2 if half else 3e-6), name


def test_no_pair_of_two_samples_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    kernels = torch.nn.functional.scaled_dot_product_attention

    def watched(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> Any:
        pairs = (query.shape[0], query.shape[2], key.shape[2])
        seen.append((pairs, None if attn_mask is None else tuple(attn_mask.shape)))
        return kernels(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    samples = [a_step()[n] for n in (0, 1, 3)]
    for kind, lengths, masks in [
        ("llama", [3, 17, 2, 18], [None] * 4),
        ("mistral", [3, 17, 2, 18], [(1, 1, n, n) for n in (3, 17, 2, 18)]),  # sees 4 at most
        ("mistral", [3, 1, 2, 2], [None] * 4),
    ]:
        model = chatbind(MODELS[kind])
        assert read_by_sequence(model.language_model, on=True)
        rows = Collator(0).packed([[samples[0], samples[1]], [samples[2]]])
        if kind == "mistral" and 17 not in lengths:  # as if cut short
            shorter = [{"input_ids": [1] * n, "labels": [1] * n} for n in (3, 1, 2)]
            rows = Collator(0).packed([shorter[:2], shorter[2:]])
        assert list(chain.from_iterable(rows["sequence_lengths"])) == lengths
        seen.clear()
        learned(model, [rows])
        wanted = [((1, n, n), mask) for n, mask in zip(lengths, masks, strict=True)]
        assert seen == wanted * model.language_model.config.num_hidden_layers


def test_other_kernels_are_told_nothing() -> None:
    inputs = {"sequence_lengths": [[3, 2]]}
    with packed_rows(chatbind(MODELS["llama"]).language_model, inputs):
        assert inputs == {}


def chosen(model: ChatBindForConditionalGeneration, **changed: Any) -> tuple[bool | None, str]:
    """Whether a run's passes are single rows (None: not packed), and its kernels."""
    settings: Any = SimpleNamespace(
        **{
            "samples_per_step": lambda world: 4 * world,
            "seed": 0,
            "group_by_length": False,
            "packing": True,
            "embedding_noise": 0.0,
            "compile": False,
            "per_device_train_batch_size": 4,
            "model_max_length": 64,
            "device": "cpu",
            **changed,
        }
    )
    samples: Any = SimpleNamespace(conversations=SimpleNamespace(sizes=lambda: [3, 4, 5]))
    steps = Steps(settings, samples, Collator(0), model)
    arguments: Any = SimpleNamespace(device=torch.device("cpu"), bf16=False, fp16=False)
    steps.on_train_begin(arguments, TrainerState(), None)
    packing = steps._samples.packing
    return packing and packing.one_row, model.language_model.config._attn_implementation


def test_a_run_reads_by_sequence_where_that_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(chatbind(MODELS["llama"])) == (True, NAME)
    assert chosen(chatbind(MODELS["eager"])) == (False, "eager")
    assert chosen(chatbind(MODELS["llama"]), compile=True) == (False, "sdpa")
    assert chosen(chatbind(MODELS["llama"]), packing=False) == (None, "sdpa")

    for attention in (deaf_attention, strict_attention):  # of models that hand less on
        monkeypatch.setitem(AttentionInterface._global_mapping, NAME, attention)
        assert chosen(chatbind(MODELS["llama"])) == (False, "sdpa")


def deaf_attention(*states: Any, sequence_lengths: Any = None, **options: Any) -> Any:
    return sdpa_attention_forward(*states, **options)


def strict_attention(module: Any, *states: Any, dropout: float, scaling: float) -> Any:
    return sdpa_attention_forward(module, *states, dropout=dropout, scaling=scaling)


@pytest.mark.parametrize("kind", MODELS)
def test_models_that_keep_samples_apart_pass_the_trial(kind: str) -> None:
    assert packs_exactly(chatbind(MODELS[kind]), torch.device("cpu"), precise=True)


def test_a_state_space_model_does_not_and_stays_in_its_mode() -> None:
    config = FalconMambaConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.3
    )
    model = chatbind(config)
    assert not packs_exactly(model, torch.device("cpu"), precise=True)
    assert model.training


def test_positions_that_do_not_begin_anew_are_found_out() -> None:
    model = chatbind(GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    device = torch.device("cpu")
    assert packs_exactly(model, device, precise=True)
    forward = model.language_model.forward

    def deaf(position_ids: Any = None, **inputs: Any) -> Any:
        """As a model that counts positions itself."""
        return forward(**inputs)

    model.language_model.forward = deaf
    assert not packs_exactly(model, device, precise=True)


def test_no_step_loses_a_sample_or_overfills_a_pass() -> None:
    random = np.random.default_rng(0)
    for trial in range(300):
        most = int(random.integers(4, 300))
        lengths = random.integers(1, most + 1, random.integers(1, 70))
        if trial % 3 == 0:  # a long tail
            lengths = np.minimum(random.geometric(8 / most, len(lengths)), most)
        processes, samples = int(random.integers(1, 5)), int(random.integers(1, 9))
        packing = Packing(
            tokens=samples * most,
            row=most,
            one_row=bool(random.integers(2)),
            samples=samples if random.integers(2) else None,
        )
        passes = packing.passes(lengths, processes)
        assert all(len(shares) == processes for shares in passes)
        rows = [row for shares in passes for share in shares for row in share]
        assert sorted(chain.from_iterable(rows)) == list(range(len(lengths)))
        for share in chain.from_iterable(passes):
            width = max((int(lengths[row].sum()) for row in share), default=0)
            assert len(share) * width <= packing.tokens
            assert packing.one_row or width <= most
            assert len(share) <= 1 or not packing.one_row


def test_processes_get_about_as_much_work() -> None:
    lengths = np.random.default_rng(3).integers(50, 900, 128)
    passes = Packing(tokens=8192, row=2048, one_row=True).passes(lengths, 4)
    assert len(passes) == -(-int(lengths.sum()) // (4 * 8192))  # no more than needed
    tokens = [int(lengths[share[0]].sum()) for shares in passes for share in shares]
    assert max(tokens) < 1.02 * min(tokens)


def test_rows_are_filled() -> None:
    lengths = np.random.default_rng(4).integers(50, 900, 128)
    (shares,) = Packing(tokens=10**9, row=2048).passes(lengths, 1)
    rows = shares[0]
    area = len(rows) * max(int(lengths[row].sum()) for row in rows)
    assert lengths.sum() / area > 0.95
    # where attention over long rows is dear, they stay short
    (shares,) = Packing(tokens=10**9, row=2048, attention=10.0).passes(lengths, 1)
    assert max(int(lengths[row].sum()) for row in shares[0]) <= 900


def test_the_first_row_with_room_takes_a_sample() -> None:
    lengths = np.array([6, 5, 4, 3, 2])
    assert first_fit(lengths, range(5), 10) == [[0, 2], [1, 3, 4]]


def test_a_row_reads_its_samples_one_after_the_other() -> None:
    one = {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "media_embeddings": torch.ones(1, 2)}
    two = {"input_ids": [8], "labels": [8]}
    three = {"input_ids": [9, 9], "labels": [-100, 9], "media_embeddings": torch.zeros(1, 2)}
    batch = Collator(0, 3).packed([[one, two], [three]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 0, 0], [9, 9, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3]]
    # nothing before a sample says what its first token is
    no = IGNORE_INDEX
    assert batch["labels"].tolist() == [[no, 6, 7, no, no, no], [no, 9, no, no, no, no]]
    assert batch["media_embeddings"].tolist() == [[1, 1], [0, 0]]
    assert batch["work"] == (3, 6, 3, 6 + 1 + 3)
    assert "attention_mask" not in batch

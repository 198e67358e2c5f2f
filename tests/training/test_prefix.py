"""What all rows begin with is computed once, and nothing is different for it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3Config,
)

from chatbind_cli.model.chatbind import ChatBindConfig, ChatBindForConditionalGeneration
from chatbind_cli.training.positions import WithPositions
from chatbind_cli.training.prefix import SharedPrefix
from chatbind_cli.training.samples import Collator
from chatbind_cli.training.stages import select_trainable
from chatbind_cli.training.throughput import Work
from tests.model.test_label_loss import results
from tests.model.tiny import SIZES

KINDS = {
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
    "gpt_neox": GPTNeoXConfig,
    "mixtral": MixtralConfig,
    "bloom": BloomConfig,
    # it looks back over four tokens only
    "mistral": lambda **sizes: MistralConfig(**sizes, sliding_window=4),
}
PATCH, START, END = 97, 98, 99
SYSTEM = [1, 5, 6, 7, 8, 9]


def chatbind(kind: str = "llama", **fields: Any) -> ChatBindForConditionalGeneration:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(
        KINDS[kind](**{**SIZES, "max_position_embeddings": 64, **fields})
    )
    config = ChatBindConfig(
        text_config=base.config,
        embedding_dim=8,
        tokens_per_embedding=2,
        use_start_end=True,
        im_patch_id=PATCH,
        im_start_id=START,
        im_end_id=END,
    )
    model = ChatBindForConditionalGeneration(config, base)
    select_trainable(model, "pretrain")
    return model.train()


def sample(question: list[int], media: int, answer: list[int]) -> dict[str, Any]:
    ids = [*SYSTEM, *question, *[START, PATCH, PATCH, END] * media, 11]
    return {
        "input_ids": [*ids, *answer],
        "labels": [-100] * len(ids) + answer,
        "media_embeddings": torch.randn(media, 8) if media else None,
    }


def collator(model: ChatBindForConditionalGeneration, **options: bool) -> WithPositions:
    options = {"at_labels": True, "frozen": True, **options}
    return WithPositions(Collator(0), model.config, **options)


def samples() -> list[dict[str, Any]]:
    torch.manual_seed(1)
    return [
        sample([20, 21], 1, [30, 31, 32]),
        sample([22], 2, [33, 34, 35, 36, 37]),
        sample([20, 23, 24], 0, [38]),
    ]


def plain(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: batch[k] for k in ("input_ids", "attention_mask", "labels", "media_embeddings")}


def test_the_collator_tells_where_things_are() -> None:
    model = chatbind()
    batch = collator(model)(samples())
    width = batch["input_ids"].shape[1]
    assert batch["prefix"] == tuple(SYSTEM)
    rows = [divmod(int(p), width) for p in batch["media_positions"]]
    assert rows == [(0, 9), (0, 10), (1, 8), (1, 9), (1, 12), (1, 13)]
    flat = batch["input_ids"].flatten()
    assert flat[batch["label_positions"] + 1].tolist() == [*range(30, 39)]
    lengths = [len(s["input_ids"]) for s in samples()]
    assert batch["work"] == Work.of(lengths, 9).without_prefix(6)


@pytest.mark.parametrize(
    ("rows", "prefix"),
    [
        ([([1, 2, 3], [-100, -100, 3])], (1,)),  # position 1 predicts a label
        ([([1, 2, 3, 4], [-100] * 3 + [4]), ([1, 2, 3, 5], [-100, 2, 3, 5])], ()),
        ([([1, 2, START, PATCH, END, 4], [-100] * 5 + [4])] * 2, (1, 2)),  # <im_start> trains
        ([([1, 2], [-100] * 2), ([1, 2], [-100] * 2)], (1,)),  # a position has to be left
        ([([1, 2], [-100] * 2), ([1, 2, 0, 0, 3], [-100] * 4 + [3])], (1, 2)),
    ],
)
def test_the_prefix_ends_before_anything_that_trains(rows: Any, prefix: tuple[int, ...]) -> None:
    made = [dict(zip(("input_ids", "labels"), row, strict=True)) for row in rows]
    batch = collator(chatbind())(made)
    assert batch["prefix"] == prefix


def test_a_label_of_the_first_position_is_predicted_by_none() -> None:
    batch = collator(chatbind())([{"input_ids": [1, 2], "labels": [1, 2]}] * 2)
    assert batch["label_positions"].tolist() == [0, 2]


def test_where_the_language_model_trains_nothing_is_constant() -> None:
    batch = collator(chatbind(), frozen=False)(samples())
    assert batch["prefix"] == ()
    assert batch["work"] == Work.of([len(s["input_ids"]) for s in samples()], 9)


@pytest.mark.parametrize("at_labels", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_the_plain_ones(
    kind: str, at_labels: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = chatbind(kind)
    batch = collator(model, at_labels=at_labels)(samples())
    loss, wanted = results(model, **plain(batch))
    shared = SharedPrefix(model, nullcontext, wanted=True)
    cut = shared.cut(batch)
    assert cut["input_ids"].shape[1] == batch["input_ids"].shape[1] - len(SYSTEM)
    got, gradients = results(model, **cut)
    torch.testing.assert_close(got, loss, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=2e-5, atol=1e-6, msg=name)
    assert not capsys.readouterr().err
    # the same again from the same states
    again, _ = results(model, **shared.cut(batch))
    torch.testing.assert_close(again, got, rtol=0, atol=0)


def test_keys_and_values_are_computed_once_for_all_batches_that_begin_alike() -> None:
    model = chatbind()
    shared = SharedPrefix(model, nullcontext, wanted=True)
    shared.cut(collator(model)(samples()))
    calls: list[int] = []
    model.language_model.model.register_forward_hook(lambda *args: calls.append(1))
    shared.cut(collator(model)(samples()[:2]))
    assert calls == []
    shared.cut(collator(model)(samples()[:1]))  # two more tokens are the same in it
    assert calls == [1]


def test_a_text_only_batch_still_has_the_projector_in_its_graph() -> None:
    model = chatbind()
    shared = SharedPrefix(model, nullcontext, wanted=True)
    batch = collator(model)([sample([20], 0, [30]), sample([21], 0, [31, 32])])
    _, gradients = results(model, **shared.cut(batch))
    assert {name.partition(".")[0] for name in gradients} == {"projector", "language_model"}
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())


def test_in_bfloat16_gradients_differ_by_rounding() -> None:
    model = chatbind()

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    batch = collator(model)(samples())
    shared = SharedPrefix(model, autocast, wanted=True)
    with autocast():
        loss, wanted = results(model, **plain(batch))
        got, gradients = results(model, **shared.cut(batch))
    assert "past_key_values" in shared.cut(batch)
    torch.testing.assert_close(got, loss, rtol=5e-3, atol=0)
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).norm() <= 3e-2 * wanted[name].norm(), name


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"attention_dropout": 0.5}, "dropout"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "length"),
    ],
)
def test_what_would_change_something_is_refused_once(
    fields: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = chatbind(**fields)
    batch = collator(model)(samples())
    shared = SharedPrefix(model, nullcontext, wanted=True)
    state = torch.random.get_rng_state()
    for _ in range(2):
        whole = shared.cut(batch)
        assert "past_key_values" not in whole
        assert "prefix" not in whole
        assert torch.equal(whole["input_ids"], batch["input_ids"])
    assert torch.equal(torch.random.get_rng_state(), state)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("chatbind: --share-prefix has no effect: ")
    assert told in line


def test_a_model_that_looks_ahead_is_found_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = chatbind()
    whole = model.language_model.model.forward

    def ahead(inputs_embeds: torch.Tensor, **kwargs: Any) -> Any:
        return whole(inputs_embeds=inputs_embeds + inputs_embeds.mean(1, True), **kwargs)

    monkeypatch.setattr(model.language_model.model, "forward", ahead)
    shared = SharedPrefix(model, nullcontext, wanted=True)
    assert "past_key_values" not in shared.cut(collator(model)(samples()))
    assert "the first batch's loss is" in capsys.readouterr().err


def test_a_batch_without_labels_proves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    model = chatbind(attention_dropout=0.5)
    empty = [{**one, "labels": [-100] * len(one["labels"])} for one in samples()]
    shared = SharedPrefix(model, nullcontext, wanted=True)
    assert "past_key_values" not in shared.cut(collator(model)(empty))
    assert not capsys.readouterr().err
    shared.cut(collator(model)(samples()))
    assert "dropout" in capsys.readouterr().err


def test_recomputed_activations_keep_no_cache(capsys: pytest.CaptureFixture[str]) -> None:
    model = chatbind()
    batch = collator(model)(samples())
    shared = SharedPrefix(model, nullcontext, wanted=True)
    assert "past_key_values" in shared.cut(batch)
    model._activation_checkpointing_enable()
    whole = shared.cut(batch)
    assert "past_key_values" not in whole
    other = SharedPrefix(model, nullcontext, wanted=True)
    assert "past_key_values" not in other.cut(batch)
    assert "gradient checkpointing" in capsys.readouterr().err

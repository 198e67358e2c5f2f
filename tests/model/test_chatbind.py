"""The model: soft tokens in place, on any language model, alone and in batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, TextStreamer

from chatbind_cli.errors import RecordError
from chatbind_cli.model.chatbind import (
    ChatBindConfig,
    ChatBindForConditionalGeneration,
    word_embeddings,
)
from tests.model.tiny import LANGUAGE_MODELS, language_model

# its new name came only after the oldest version of transformers that we allow
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")

PAD, PATCH, START, END = 0, 97, 98, 99


def chatbind(kind: str = "llama", **fields: Any) -> ChatBindForConditionalGeneration:
    base = language_model(kind)
    options = {"embedding_dim": 8, "tokens_per_embedding": 2, **fields}
    config = ChatBindConfig(
        text_config=base.config, im_patch_id=PATCH, im_start_id=START, im_end_id=END, **options
    )
    return ChatBindForConditionalGeneration(config, base).eval()


def span(tokens: int = 2) -> list[int]:
    return [START, *[PATCH] * tokens, END]


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_logits_equal_the_language_models_on_hand_made_inputs(kind: str) -> None:
    model = chatbind(kind)
    row = [1, 5, *span(), 6, *span(), 7]
    media = torch.randn(2, 8)
    words = word_embeddings(model)(ids(row))[0]
    soft = model.projector(functional.normalize(media, dim=-1)).flatten(0, 1)
    by_hand = words.clone()
    for position, token in zip([3, 4, 8, 9], soft, strict=True):
        by_hand[position] = token
    wanted = model.language_model(inputs_embeds=by_hand.unsqueeze(0)).logits
    got = model(ids(row), media_embeddings=media).logits
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_a_saved_model_is_the_same_model(kind: str, tmp_path: Path) -> None:
    model = chatbind(kind)
    model.save_pretrained(tmp_path)
    again, report = ChatBindForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    row, media = ids([1, *span(), 5]), torch.randn(1, 8)
    # the weights are equal bit for bit; where they lie in memory changes the order of sums
    assert all(
        torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items()
    )
    torch.testing.assert_close(
        again(row, media_embeddings=media).logits,
        model(row, media_embeddings=media).logits,
        atol=1e-6,
        rtol=1e-5,
    )
    tied = model.config.tie_word_embeddings
    output = again.get_output_embeddings().weight
    assert (output is word_embeddings(again).weight) == tied


def test_shards_and_auto_classes_load_it_too(tmp_path: Path) -> None:
    model = chatbind()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert isinstance(again, ChatBindForConditionalGeneration)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert again.language_model.config._attn_implementation == "eager"
    assert "LlamaDecoderLayer" in again._no_split_modules


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_generation_in_a_left_padded_batch_equals_generation_alone(kind: str) -> None:
    model = chatbind(kind)
    long, short = [1, 5, 6, 7, *span(), 8, *span()], [1, *span(), 9]
    media = torch.randn(3, 8)
    settings = GenerationConfig(
        max_new_tokens=6, do_sample=False, eos_token_id=101, pad_token_id=PAD, use_cache=True
    )
    settings.suppress_tokens = model.generation_config.suppress_tokens
    gap = [PAD] * (len(long) - len(short))
    batch = ids(long, gap + short)
    mask = (torch.arange(len(long)) >= torch.tensor([[0], [len(gap)]])).long()
    together = model.generate(
        batch, attention_mask=mask, media_embeddings=media, generation_config=settings
    )
    for row, own, index in ((long, media[:2], 0), (short, media[2:], 1)):
        alone = model.generate(
            ids(row),
            attention_mask=torch.ones(1, len(row), dtype=torch.long),
            media_embeddings=own,
            generation_config=settings,
        )
        assert alone[0, len(row) :].tolist() == together[index, len(long) :].tolist()


def test_the_cache_changes_nothing_and_media_are_read_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = chatbind()
    calls: list[int] = []
    whole = model.soft_tokens

    def counted(*args: Any) -> torch.Tensor:
        calls.append(1)
        return whole(*args)

    monkeypatch.setattr(model, "soft_tokens", counted)
    row, media = ids([1, *span(), 5]), torch.randn(1, 8)
    outputs = []
    for use_cache, reads in ((True, 1), (False, 6)):
        calls.clear()
        settings = GenerationConfig(
            max_new_tokens=6, do_sample=False, eos_token_id=101, pad_token_id=PAD,
            use_cache=use_cache,
        )  # fmt: skip
        outputs.append(
            model.generate(
                row,
                attention_mask=torch.ones_like(row),
                media_embeddings=media,
                generation_config=settings,
            )
        )
        assert len(calls) == reads
    assert torch.equal(*outputs)


def test_media_tokens_are_never_written_and_harmless_if_they_are() -> None:
    model = chatbind()
    assert model.generation_config.suppress_tokens == [PATCH, START, END]
    row, media = ids([1, *span(), 5]), torch.randn(1, 8)
    prompt = model(row, media_embeddings=media, use_cache=True)
    more = model(ids([PATCH]), past_key_values=prompt.past_key_values)
    assert more.logits.shape == (1, 1, 100)


def test_beams_keep_each_rows_media_together() -> None:
    model = chatbind()
    batch = ids([1, *span(), 5, *span(), 6], [1, 2, 3, 4, 5, *span(), 6, 7])
    media = torch.randn(3, 8)
    expanded, more = model._expand_inputs_for_generation(
        expand_size=2, input_ids=batch, media_embeddings=media, media_weights=torch.arange(3.0)
    )
    assert expanded.shape[0] == 4
    assert torch.equal(more["media_embeddings"], media[[0, 1, 0, 1, 2, 2]])
    assert more["media_weights"].tolist() == [0, 1, 0, 1, 2, 2]


def test_a_streamer_gets_the_tokens_as_they_come() -> None:
    seen: list[int] = []

    class Listener(TextStreamer):
        def __init__(self) -> None:
            self.prompt = True

        def put(self, value: torch.Tensor) -> None:
            seen.extend(value.flatten().tolist())

        def end(self) -> None:
            seen.append(-1)

    model = chatbind()
    row = ids([1, *span(), 5])
    settings = GenerationConfig(
        max_new_tokens=3, do_sample=False, eos_token_id=101, pad_token_id=PAD
    )
    answer = model.generate(
        row,
        attention_mask=torch.ones_like(row),
        media_embeddings=torch.randn(1, 8),
        generation_config=settings,
        streamer=Listener(),
    )
    assert seen == [*answer[0].tolist(), -1]


@pytest.mark.parametrize(
    ("row", "count", "message"),
    [
        ([1, *span(), *span()], 1, r"4 <im_patch> token\(s\), but there are 1 media of 2 tokens"),
        ([1, 5], 1, "0 <im_patch>"),
        ([1, *span()], 0, "2 <im_patch>.* 0 media"),
        ([1, START, PATCH, END], 1, "1 <im_patch>"),
    ],
)
def test_placeholders_and_media_must_agree(row: list[int], count: int, message: str) -> None:
    media = torch.randn(count, 8) if count else None
    with pytest.raises(RecordError, match=message):
        chatbind()(ids(row), media_embeddings=media)


def test_normalising_makes_the_length_of_an_embedding_irrelevant_and_publishing_keeps_it() -> None:
    row, media = ids([1, *span(), 5]), torch.randn(1, 8)
    for normalise in (True, False):
        model = chatbind(normalize_embeddings=normalise)
        once = model(row, media_embeddings=media).logits
        louder = model(row, media_embeddings=media * 20).logits
        assert torch.allclose(once, louder, atol=1e-6) == normalise


def test_a_weight_counts_after_normalisation() -> None:
    model = chatbind()
    media = torch.randn(2, 8)
    whole = model.soft_tokens(media)
    weighed = model.soft_tokens(media, torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(weighed[0], whole[0] / 2)  # the bias is zero at the start
    assert weighed[1].abs().max() == 0


def test_the_loss_is_that_of_the_labelled_positions() -> None:
    model = chatbind()
    row, media = ids([1, *span(), 5, 6, 7]), torch.randn(1, 8)
    labels = torch.tensor([[-100] * 6 + [6, 7]])
    result = model(row, media_embeddings=media, labels=labels)
    logits = result.logits[0, 5:7]  # the position before each label predicts it
    wanted = functional.cross_entropy(logits, torch.tensor([6, 7]))
    torch.testing.assert_close(result.loss, wanted)


def test_a_text_batch_in_training_leaves_a_zero_gradient_on_the_projector() -> None:
    model = chatbind().train()
    row = ids([1, 5, 6])
    model(row, labels=row).loss.backward()
    for parameter in model.projector.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_language_model_still_trains_the_projector(checkpointing: bool) -> None:
    model = chatbind().train()
    model.language_model.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable()
    row = ids([1, *span(), 5])
    model(row, media_embeddings=torch.randn(1, 8), labels=row).loss.backward()
    gradients = [p.grad for p in model.projector.parameters()]
    assert all(g is not None and g.abs().max() > 0 for g in gradients)
    assert all(p.grad is None for p in model.language_model.parameters())


def test_gradient_checkpointing_changes_no_gradient() -> None:
    row, media = ids([1, *span(), 5]), torch.randn(1, 8)
    gradients = []
    for checkpointing in (False, True):
        model = chatbind().train()
        torch.manual_seed(1)
        model.projector.reset_parameters()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(row, media_embeddings=media, labels=row).loss.backward()
        gradients.append(model.projector.layers[0].weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_making_it_around_a_language_model_leaves_that_ones_weights_alone() -> None:
    base = language_model()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = ChatBindConfig(text_config=base.config, embedding_dim=8)
    model = ChatBindForConditionalGeneration(config, base)
    after = model.language_model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_placeholders_before_an_empty_cache_want_their_media() -> None:
    with pytest.raises(RecordError, match="2 <im_patch> token"):
        chatbind()(ids([1, *span()]), past_key_values=DynamicCache())


def test_keys_and_values_are_kept_for_generation_alone() -> None:
    model, row = chatbind(), ids([1, 5, 6])
    assert model(row).past_key_values is not None
    assert model(row, labels=row).past_key_values is None
    assert model(row, labels=row, use_cache=True).past_key_values is not None

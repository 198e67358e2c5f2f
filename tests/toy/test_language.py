from itertools import islice
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatbind_cli.model.label_loss import IGNORE_INDEX
from chatbind_cli.toy import language
from chatbind_cli.toy.texts import conversations, passages


@pytest.fixture(scope="module")
def tokenizer():
    return language.train_tokenizer(0)


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ("This is a seven.", "Grüße, 数字 7\n\n### 😀 </s>", "  two  spaces "):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert tokenizer("seven")["input_ids"][0] == tokenizer.bos_token_id


def test_words_of_the_toy_world_are_single_tokens(tokenizer):
    for word in (" seven", "Seven", " digit", " Assistant"):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1


def test_a_saved_model_is_loaded_by_transformers_and_the_same(tokenizer, tmp_path):
    report = lambda step, loss: None  # noqa: E731
    model = language.train_language_model(tokenizer, steps=2, seed=0, report=report)
    language.make_language_model(tmp_path / "llama", 2, 0, report)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    again = AutoTokenizer.from_pretrained(tmp_path / "llama")
    ids = tokenizer("Which digit is this?\nseven", return_tensors="pt")["input_ids"]
    assert again("Which digit is this?\nseven")["input_ids"] == ids[0].tolist()
    assert again.eos_token == "</s>"
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert loaded.config.max_position_embeddings == 2048


def test_the_loss_falls_and_training_is_repeatable(tokenizer):
    losses = []
    models = [
        language.train_language_model(
            tokenizer, steps=15, seed=seed, report=lambda step, loss: losses.append(loss)
        )
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1]
    first, again, other = (model.lm_head.weight for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # fresh weights guess among 700 tokens: 6.6; a mean over fifteen steps below 6 has learned
    assert losses[0] < 6


def test_answers_are_learned_and_questions_are_not(tokenizer):
    for sample in islice(language.samples(tokenizer, Random(0)), 40):
        learned = [i for i, label in zip(sample["input_ids"], sample["labels"], strict=True)
                   if label != IGNORE_INDEX]  # fmt: skip
        text = tokenizer.decode(learned)
        assert learned
        if len(learned) < len(sample["input_ids"]):  # a conversation
            assert "Human" not in text and "USER" not in text
            assert "###" in text or "</s>" in text


def test_a_conversation_names_its_digit_in_the_first_question():
    for turns in islice(conversations(Random(1)), 50):
        assert len(turns) % 2 == 0
        assert not any(turn.media for turn in turns)
        assert turns[0].text.count("\n") == 1
    assert next(passages(Random(1))).count(".") >= 3

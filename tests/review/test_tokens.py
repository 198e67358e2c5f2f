"""Counting tokens: the estimate against a real tokenizer, and the tokenizers one can name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chatbind_cli.errors import CheckpointError, UsageError
from chatbind_cli.review.tokens import counter_for, estimate, message_tokens


def test_the_estimate_is_near_a_real_tokenizer_and_rather_high(shared_data: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = shared_data / "tokenizer"
    real = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    lines = (shared_data / "llava" / "qa90_gpt4_answer.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    ours, theirs = sum(map(estimate, texts)), sum(len(real.encode(text)) for text in texts)
    # LLaMA's 32,000 pieces cut finer than the 100,000 and 200,000 of hosted judges.
    assert 0.95 <= ours / theirs <= 1.25


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("", 0), ("a dog", 2), ("12345678", 3), ("well-known", 3), ("日本語", 6)],
)
def test_what_is_counted_as_what(text: str, tokens: int) -> None:
    assert estimate(text) == pytest.approx(tokens, abs=1)


def test_every_message_costs_a_little_more_than_its_words() -> None:
    assert message_tokens([{"content": "a dog"}, {"content": ""}], estimate) == 2 + 2 * 4


def test_a_tokenizers_folder_counts_exactly(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "dog": 1}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path)
    count, name = counter_for(str(tmp_path))
    assert (count("a dog and a dog"), name) == (5, str(tmp_path))


def test_a_tokenizer_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model folder"):
        counter_for(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="knows no encoding 'x'|not installed"):
        counter_for("tiktoken:x")
    assert counter_for(None)[1] == "estimate"

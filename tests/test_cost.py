"""Tokens, prices, and the line that the money spent may not cross."""

from __future__ import annotations

import asyncio
import datetime
import json
from pathlib import Path

import pytest

from chatbind_cli.cost import (
    Budget,
    Price,
    counter_for,
    estimate,
    find_price,
    message_tokens,
)
from chatbind_cli.errors import CheckpointError, EngineError, RecordError, UsageError
from chatbind_cli.hosted import Role

PRICE = Price(input=10.0, output=100.0)
ROLE = Role("painter", "painted", EngineError)


def test_tokens_are_priced_by_the_million() -> None:
    assert PRICE.cost_usd(1_000_000, 10_000) == pytest.approx(11.0)


def test_a_dated_name_has_the_price_of_its_model() -> None:
    assert find_price("gpt-4o-2024-08-06") == find_price("gpt-4o") is not None
    assert find_price("gpt-4-0613") == find_price("gpt-4")
    assert find_price("gpt-4o-mini") != find_price("gpt-4o")
    assert find_price("gpt-4o-2024-05-13") == Price(5.0, 15.0), "it was dearer"
    assert find_price("my-judge") is None


def test_the_users_table_wins(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text('["my-judge"]\ninput = 1\noutput = 2.5\n[gpt-4o]\ninput = 0\noutput = 0\n')
    assert find_price("my-judge", path) == Price(1.0, 2.5)
    assert find_price("gpt-4o", path) == Price(0.0, 0.0)
    assert find_price("gpt-4", path) is not None


def test_a_price_says_where_it_comes_from_and_how_old_it_is(tmp_path: Path) -> None:
    own = find_price("gpt-4o")
    assert own is not None and own.as_of is not None
    text = own.text(own.as_of + datetime.timedelta(days=400))
    assert text == (
        "2.5 USD a million tokens sent, 10 received, from our own table as of "
        f"{own.as_of} (13 months old): check your provider's list, and give --prices where it "
        "differs"
    )
    path = tmp_path / "prices.toml"
    path.write_text("as_of = 2026-01-31\n[m]\ninput = 1\noutput = 2\n")
    theirs = find_price("m", path)
    assert theirs is not None
    assert theirs.text(datetime.date(2026, 3, 3)) == (
        f"1 USD a million tokens sent, 2 received, from {path} as of 2026-01-31 (1 month old)"
    )


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "x = 1",
        "[m]\ninput = 1",
        "[m]\ninput = -1\noutput = 1",
        "[m]\ninput = nan\noutput = 1",
        "as_of = 2026",
    ],
)
def test_a_wrong_table_names_its_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(RecordError, match=r"prices\.toml: "):
        find_price("m", path)


def test_a_request_that_could_cross_the_line_is_not_made() -> None:
    async def go() -> None:
        budget = Budget(PRICE, 1.0, 0.5, ROLE)
        # 10,000 tokens sent and 2,000 received at most: 0.3 USD
        async with budget.request(10_000, 2_000):
            assert budget.pay(9_000, 500) == pytest.approx(0.14)
        assert budget.spent_usd == pytest.approx(0.64)
        async with budget.request(10_000, 2_000):
            pass  # a reply that never came is not paid for
        with pytest.raises(EngineError, match=r"limit of 1 USD: 0\.6400 USD .* is painted"):
            async with budget.request(10_000, 3_000):
                raise AssertionError("it may not start")

    asyncio.run(go())


def test_where_only_what_is_under_way_stands_in_the_way_it_is_waited_for() -> None:
    async def go() -> None:
        budget = Budget(PRICE, 0.5, 0.0, ROLE)
        started: list[int] = []

        async def ask(number: int) -> None:
            async with budget.request(10_000, 2_000):
                started.append(number)
                await asyncio.sleep(0.01)
                budget.pay(1_000, 10)

        first, second = asyncio.create_task(ask(1)), asyncio.create_task(ask(2))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert started == [1]
        await asyncio.wait_for(asyncio.gather(first, second), 5)
        assert started == [1, 2]

    asyncio.run(go())


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
    with pytest.raises(UsageError, match="tiktoken:x cannot be used"):
        counter_for("tiktoken:x")
    assert counter_for(None)[1] == "estimate"

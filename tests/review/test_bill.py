"""Prices, and the line that the money spent may not cross."""

from __future__ import annotations

import asyncio
import datetime
from pathlib import Path

import pytest

from chatbind_cli.errors import JudgeError, RecordError
from chatbind_cli.review.bill import Bill, Price, find_price, load_prices

PRICE = Price(input=10.0, output=100.0)


def test_tokens_are_priced_by_the_million() -> None:
    assert PRICE.cost_usd(1_000_000, 10_000) == pytest.approx(11.0)


def test_a_dated_name_has_the_price_of_its_model() -> None:
    prices = load_prices()
    assert find_price("gpt-4o-2024-08-06", prices) == prices["gpt-4o"]
    assert find_price("gpt-4-0613", prices) == prices["gpt-4"]
    assert find_price("gpt-4o-mini", prices) != prices["gpt-4o"]
    assert find_price("gpt-4o-2024-05-13", prices) == Price(5.0, 15.0), "it was dearer"
    assert find_price("my-judge", prices) is None


def test_the_users_table_wins(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text('["my-judge"]\ninput = 1\noutput = 2.5\n[gpt-4o]\ninput = 0\noutput = 0\n')
    prices = load_prices(path)
    assert prices["my-judge"] == Price(1.0, 2.5)
    assert prices["gpt-4o"] == Price(0.0, 0.0)
    assert "gpt-4" in prices


def test_a_price_says_where_it_comes_from_and_how_old_it_is(tmp_path: Path) -> None:
    own = load_prices()["gpt-4o"]
    assert own.as_of is not None
    text = own.text(own.as_of + datetime.timedelta(days=400))
    assert text == (
        "2.5 USD a million tokens sent, 10 received, from our own table as of "
        f"{own.as_of} (13 months old): check your provider's list, and give --prices where it "
        "differs"
    )
    path = tmp_path / "prices.toml"
    path.write_text("as_of = 2026-01-31\n[m]\ninput = 1\noutput = 2\n")
    theirs = load_prices(path)["m"]
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
        load_prices(path)


def test_a_request_that_could_cross_the_line_is_not_made() -> None:
    async def go() -> None:
        bill = Bill(PRICE, limit_usd=1.0, spent_usd=0.5)
        # 10,000 tokens sent and 2,000 received at most: 0.3 USD
        reserved = await bill.reserve(10_000, 2_000)
        assert reserved == pytest.approx(0.3)
        assert bill.settle(reserved, 9_000, 500) == pytest.approx(0.14)
        assert bill.spent_usd == pytest.approx(0.64)
        await bill.reserve(10_000, 2_000)
        bill.release(0.3, charged=False)
        with pytest.raises(JudgeError, match=r"before the cost limit of 1 USD: 0\.6400 USD are"):
            await bill.reserve(10_000, 3_000)

    asyncio.run(go())


def test_where_only_what_is_set_aside_stands_in_the_way_it_is_waited_for() -> None:
    async def go() -> None:
        bill = Bill(PRICE, limit_usd=0.5)
        reserved = await bill.reserve(10_000, 2_000)
        second = asyncio.create_task(bill.reserve(10_000, 2_000))
        await asyncio.sleep(0.01)
        assert not second.done()
        bill.settle(reserved, 1_000, 10)
        assert await asyncio.wait_for(second, 1) == pytest.approx(0.3)

    asyncio.run(go())


def test_a_lost_reply_counts_as_the_most_that_it_can_have_cost() -> None:
    async def go() -> None:
        bill = Bill(PRICE, limit_usd=10.0)
        bill.release(await bill.reserve(10_000, 2_000), charged=True)
        assert bill.spent_usd == pytest.approx(0.3)

    asyncio.run(go())


def test_a_server_with_more_tokens_than_can_be_is_taken_at_its_word() -> None:
    async def go() -> None:
        bill = Bill(PRICE, limit_usd=10.0)
        bill.learn(1_000, 2_000)
        assert await bill.reserve(10_000, 0) == pytest.approx(0.2)

    asyncio.run(go())

"""Which judge the settings mean, before anybody is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatbind_cli.errors import JudgeError, RecordError, UsageError
from chatbind_cli.review.bill import Price
from chatbind_cli.review.choosing import DEFAULT_MODEL, JudgeSettings, choose, resolve


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def test_auto_asks_a_chat_model_only_where_one_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(JudgeSettings()) == "rule"
    assert resolve(JudgeSettings(url="http://127.0.0.1:1/v1")) == "openai"
    assert resolve(JudgeSettings(model="m")) == "openai"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")
    assert resolve(JudgeSettings()) == "openai"
    assert resolve(JudgeSettings(kind="rule")) == "rule"


def test_the_rule_judge_is_free_and_counts_nothing() -> None:
    chosen = choose(JudgeSettings())
    assert (chosen.is_rule, chosen.is_free, chosen.counted_by) == (True, True, "")


def test_a_chat_judge_has_a_price_by_its_name_or_none(tmp_path: Path) -> None:
    url = "http://127.0.0.1:1/v1"
    chosen = choose(JudgeSettings(url=url))
    assert (chosen.judge.name, chosen.price) == (DEFAULT_MODEL, Price(2.5, 10.0))
    assert choose(JudgeSettings(url=url, model="mine")).price is None
    prices = tmp_path / "p.toml"
    prices.write_text("[mine]\ninput = 1\noutput = 2\n")
    chosen = choose(JudgeSettings(url=url, model="mine", prices=prices, max_cost_usd=1.0))
    assert chosen.price == Price(1.0, 2.0)
    assert not chosen.is_free


def test_what_cannot_be_chosen_is_said_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the price of 'mine' is not known"):
        choose(JudgeSettings(model="mine", max_cost_usd=1.0))
    with pytest.raises(UsageError, match="--judge local needs --judge-model"):
        choose(JudgeSettings(kind="local"))
    with pytest.raises(JudgeError, match="no API key in OPENAI_API_KEY"):
        choose(JudgeSettings(model="m"))
    assert choose(JudgeSettings(model="m"), will_ask=False).judge.name == "m"
    rules = tmp_path / "rule.json"
    rules.write_text("{}")
    with pytest.raises(RecordError, match=r"rule\.json"):
        choose(JudgeSettings(model="m", rules=rules))

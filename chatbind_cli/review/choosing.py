"""Which judge is meant, and what its tokens cost.

Settings in, a judge out. Knows nothing of the command line or of records.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chatbind_cli.errors import UsageError
from chatbind_cli.review.bill import FREE, Price, find_price, load_prices
from chatbind_cli.review.chat_errors import KEY_VARIABLE
from chatbind_cli.review.chat_judge import ChatJudge, ChatJudgeOptions
from chatbind_cli.review.judges import Judge, RuleJudge
from chatbind_cli.review.local_judge import LocalJudge, LocalJudgeOptions
from chatbind_cli.review.rules import Rules, load_rules
from chatbind_cli.review.tokens import counter_for

DEFAULT_MODEL = "gpt-4o"
Kind = Literal["auto", "openai", "local", "rule"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeSettings:
    """Who judges and how.

    Attributes:
        kind: `auto` is `openai` where a key, a model or an address is given, else `rule`.
        url: the endpoint's address, None for OpenAI's own.
        model: the model's name there, or a folder for `local`.
        rules: a rule file, None for our own rules.
        temperature: 0 for the most likely words.
        max_tokens: most tokens of one review.
        structured: whether to ask for a JSON object.
        timeout_s: longest wait for one reply.
        retries: further attempts a request.
        concurrency: most judgements at a time.
        requests_per_minute: the endpoint's limit.
        tokens_per_minute: the same in tokens.
        max_cost_usd: the line that is not crossed.
        prices: a file of prices, over our own table.
        tokenizer: counts tokens, None to estimate.
        device: where a `local` model runs.
        dtype: its numbers.
    """

    kind: Kind = "auto"
    url: str | None = None
    model: str | None = None
    rules: Path | None = None
    temperature: float = 0.0
    max_tokens: int = 1024
    structured: Literal["auto", "off"] = "auto"
    timeout_s: float = 120.0
    retries: int = 5
    concurrency: int = 8
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_cost_usd: float | None = None
    prices: Path | None = None
    tokenizer: str | None = None
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True, slots=True)
class Chosen:
    """A judge that is ready, and what is known of its tokens.

    Attributes:
        judge: the judge.
        is_rule: whether it only compares words.
        price: what its tokens cost, None if nobody knows.
        counted_by: what counts its tokens, empty if none are counted.
    """

    judge: Judge
    is_rule: bool
    price: Price | None
    counted_by: str

    @property
    def is_free(self) -> bool:
        """Whether its tokens cost nothing."""
        return self.price is FREE


def resolve(settings: JudgeSettings) -> Kind:
    """The kind that `auto` stands for."""
    if settings.kind != "auto":
        return settings.kind
    chat = settings.url or settings.model or os.environ.get(KEY_VARIABLE)
    return "openai" if chat else "rule"


def choose(
    settings: JudgeSettings,
    *,
    spent_usd: float = 0.0,
    on_paid: Callable[[float], None] = lambda usd: None,
    will_ask: bool = True,
) -> Chosen:
    """The judge that the settings mean.

    Args:
        settings: who and how.
        spent_usd: what earlier runs paid, for the cost limit.
        on_paid: called with each amount as soon as it is paid, in USD.
        will_ask: whether requests will go out; a plan needs no key.

    Raises:
        UsageError: a limit on the cost without a price, or a `local` judge without a model.
        JudgeError: OpenAI's own endpoint without a key.
        RecordError: a rule or price file that cannot be used.
        CheckpointError: there is no such model or tokenizer.
    """
    kind = resolve(settings)
    if kind == "rule":
        return Chosen(RuleJudge(), is_rule=True, price=FREE, counted_by="")
    rules = load_rules(settings.rules) if settings.rules else Rules()
    if kind == "local":
        judge = _local_judge(settings, rules)
        return Chosen(judge, is_rule=False, price=FREE, counted_by="the judge's own tokenizer")
    return _chat_judge(settings, rules, spent_usd, on_paid, will_ask)


def _local_judge(settings: JudgeSettings, rules: Rules) -> Judge:
    if not settings.model:
        raise UsageError("--judge local needs --judge-model, a language model's folder")
    options = LocalJudgeOptions(
        model=settings.model,
        device=settings.device,
        dtype=settings.dtype,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        batch_size=settings.concurrency,
    )
    return LocalJudge(rules, options)


def _chat_judge(
    settings: JudgeSettings,
    rules: Rules,
    spent_usd: float,
    on_paid: Callable[[float], None],
    will_ask: bool,
) -> Chosen:
    model = settings.model or DEFAULT_MODEL
    price = find_price(model, load_prices(settings.prices))
    if price is None and settings.max_cost_usd is not None:
        raise UsageError(
            f"the price of {model!r} is not known, so --max-cost cannot be kept",
            hint="give it with --prices",
        )
    count, counted_by = counter_for(settings.tokenizer)
    options = ChatJudgeOptions(
        model=model,
        base_url=settings.url,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        structured=settings.structured,
        timeout_s=settings.timeout_s,
        retries=settings.retries,
        concurrency=settings.concurrency,
        requests_per_minute=settings.requests_per_minute,
        tokens_per_minute=settings.tokens_per_minute,
        price=price or FREE,
        max_cost_usd=settings.max_cost_usd,
        spent_usd=spent_usd,
        on_paid=on_paid,
        count=count,
    )
    judge = ChatJudge(rules, options, will_ask=will_ask)
    return Chosen(judge, is_rule=False, price=price, counted_by=counted_by)

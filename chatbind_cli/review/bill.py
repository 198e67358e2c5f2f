"""What judging costs: prices, the money spent so far, and the line that it may not cross.

Before a request goes out, the most that it can cost is set aside; the reply says what it did
cost. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import datetime
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from chatbind_cli.errors import JudgeError, RecordError

_MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars a million tokens.

    Attributes:
        input: of the prompt.
        output: of the reply.
        as_of: the day on which that was the price, None if nobody says.
        source: the table that says so, empty for our own.
    """

    input: float
    output: float
    as_of: datetime.date | None = field(default=None, compare=False)
    source: str = field(default="", compare=False)

    def cost_usd(self, prompt_tokens: float, completion_tokens: float) -> float:
        """What so many tokens cost."""
        return (prompt_tokens * self.input + completion_tokens * self.output) / _MILLION

    def text(self, today: datetime.date | None = None) -> str:
        """The price in words, with where it comes from and how old it is."""
        text = f"{self.input:g} USD a million tokens sent, {self.output:g} received"
        text += f", from {self.source or 'our own table'}"
        if self.as_of is not None:
            months = ((today or datetime.datetime.now(datetime.UTC).date()) - self.as_of).days // 30
            text += f" as of {self.as_of} ({months} {'month' if months == 1 else 'months'} old)"
        if not self.source:
            text += ": check your provider's list, and give --prices where it differs"
        return text


FREE = Price(0.0, 0.0)


def load_prices(path: Path | None = None) -> dict[str, Price]:
    """Our own table of prices, and the user's over it.

    Raises:
        RecordError: the user's file is not TOML of the form of ours.
    """
    own = resources.files("chatbind_cli.review").joinpath("prices.toml").read_text("utf-8")
    prices = _table(tomllib.loads(own), "")
    if path is not None:
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise RecordError(f"is not TOML ({error})", where=str(path)) from error
        prices.update(_table(document, str(path)))
    return prices


def _table(document: dict[str, object], source: str) -> dict[str, Price]:
    as_of = document.pop("as_of", None)
    if isinstance(as_of, datetime.datetime):
        as_of = as_of.date()
    if as_of is not None and not isinstance(as_of, datetime.date):
        raise RecordError("as_of is no date", where=source, hint="as in as_of = 2026-01-31")
    found = {}
    for model, entry in document.items():
        values = [entry.get(key) for key in ("input", "output")] if isinstance(entry, dict) else []
        good = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(good) != 2 or not all(0 <= value < float("inf") for value in good):
            hint = 'as in ["my-judge"] with input = 2.5 and output = 10.0, in USD a million tokens'
            raise RecordError(f"{model!r} has no two prices", where=source, hint=hint)
        found[model] = Price(float(good[0]), float(good[1]), as_of, source)
    return found


def find_price(model: str, prices: Mapping[str, Price]) -> Price | None:
    """The price of a model by its name, or by its name without a date (`gpt-4o-2024-08-06`)."""
    if model in prices:
        return prices[model]
    return prices.get(re.sub(r"-(?:\d{4}|\d{6}|\d{8}|\d{4}-\d{2}-\d{2})$", "", model))


class Bill:
    """Money spent and set aside.

    Args:
        price: what tokens cost.
        limit_usd: the line that is not crossed, None for no line.
        spent_usd: what was spent before.
        on_paid: called with each amount as soon as it is paid, in USD.
    """

    def __init__(
        self,
        price: Price = FREE,
        *,
        limit_usd: float | None = None,
        spent_usd: float = 0.0,
        on_paid: Callable[[float], None] = lambda usd: None,
    ) -> None:
        self.price = price
        self.limit_usd = limit_usd
        self.spent_usd = spent_usd
        self._on_paid = on_paid
        self._reserved_usd = 0.0
        self._ratio = 1.0  # grows if a server has more tokens than can be
        self._changed = asyncio.Event()

    async def reserve(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Sets the most that a request can cost aside, and returns it in USD.

        Args:
            prompt_tokens: the most that the prompt can have.
            completion_tokens: the most that the reply may have.

        Where only what others have set aside stands in the way, waits for what they really cost.

        Raises:
            JudgeError: the request could cross the line.
        """
        worst = self.price.cost_usd(prompt_tokens * self._ratio, completion_tokens)
        while self.limit_usd is not None:
            if self.spent_usd + self._reserved_usd + worst <= self.limit_usd:
                break
            if self._reserved_usd <= 0:
                raise JudgeError(
                    f"stopped before the cost limit of {self.limit_usd:g} USD: "
                    f"{self.spent_usd:.4f} USD are spent, and the next request may cost "
                    f"{worst:.4f} USD",
                    hint="what is judged is on disk; go on with a higher --max-cost",
                )
            await self._changed.wait()
        self._reserved_usd += worst
        return worst

    def settle(self, reserved_usd: float, prompt_tokens: int, completion_tokens: int) -> float:
        """A reply came: books what it cost, and returns it in USD."""
        cost = self.price.cost_usd(prompt_tokens, completion_tokens)
        self._book(reserved_usd, cost)
        return cost

    def learn(self, most_tokens: int, prompt_tokens: int) -> None:
        """Takes note of a prompt that had more tokens than it was said to have at most."""
        self._ratio = max(self._ratio, prompt_tokens / max(1, most_tokens))

    def release(self, reserved_usd: float, *, charged: bool) -> None:
        """No reply came; `charged` if the server may have worked and charge for it."""
        self._book(reserved_usd, reserved_usd if charged else 0.0)

    def _book(self, reserved_usd: float, cost_usd: float) -> None:
        self._reserved_usd = max(0.0, self._reserved_usd - reserved_usd)
        if self._reserved_usd < 1e-12:
            self._reserved_usd = 0.0  # what is left of rounding sets nothing aside
        self.spent_usd += cost_usd
        self._on_paid(cost_usd)
        self._changed.set()
        self._changed = asyncio.Event()

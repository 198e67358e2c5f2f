"""What a hosted model costs: tokens, their price, and the line that may not be crossed."""

from __future__ import annotations

import asyncio
import datetime
import re
import tomllib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from chatbind_cli.errors import ChatBindError, RecordError, UsageError, reason
from chatbind_cli.hosted import Role

Counter = Callable[[str], int]
USUAL_REVIEW_TOKENS = 200
"""Two scores and a paragraph; GPT-4's published reviews of Vicuna have about 150."""

# Letters by six, digits by three, everything else one by one, about as BPE tokenizers cut.
_PIECE = re.compile(r"[^\W\d_]{1,6}|\d{1,3}|[^\w\s]|_|\n+")
_MESSAGE_TOKENS = 4
"""What a chat's form adds to each message (role and marks)."""

_MILLION = 1_000_000


def estimate(text: str) -> int:
    """A text's tokens, a little more than today's tokenizers make of English.

    Tokenizers of hosted models are not on this machine unless the user has them. Other scripts
    are cut finer: about two bytes a token at worst.
    """
    pieces = _PIECE.findall(text)
    return sum(1 if piece.isascii() else -(-len(piece.encode()) // 2) for piece in pieces)


def counter_for(name: str | None) -> tuple[Counter, str]:
    """What counts tokens, and what to call it.

    Args:
        name: a tokenizer's folder or Hugging Face name, `tiktoken:ENCODING`, or None to estimate.

    Raises:
        CheckpointError: there is no such tokenizer.
        UsageError: tiktoken is asked for and not installed, or knows no such encoding.
    """
    if name is None:
        return estimate, "estimate"
    kind, _, encoding = name.partition(":")
    if kind == "tiktoken":
        try:
            import tiktoken  # noqa: PLC0415  not everybody has it

            coder = tiktoken.get_encoding(encoding)
        except (ImportError, ValueError) as error:
            what = f"{name} cannot be used ({reason(error)})"
            raise UsageError(what, hint="pip install tiktoken") from error
        return lambda text: len(coder.encode(text, disallowed_special=())), name
    from chatbind_cli.model.pretrained import open_tokenizer  # noqa: PLC0415  brings transformers

    tokenizer: Any = open_tokenizer(name)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]), name


def message_tokens(messages: list[Any], count: Counter) -> int:
    """The tokens of a chat's messages."""
    return sum(count(message["content"]) + _MESSAGE_TOKENS for message in messages)


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
SHARE_OF_BATCHES = 0.5
"""Of the price, for what may take a day: OpenAI's, and those of the others that have batches."""


@dataclass(slots=True, kw_only=True)
class Plan:
    """What a run would ask a model, and what that would cost.

    Attributes:
        records: those that the files ask for.
        done: those that are there already, or are asked for once for several.
        failing: those about which nobody can be asked.
        completion_tokens: what would come back, if replies are of the usual length.
        completion_tokens_at_most: the same if every reply is as long as allowed.
        cost_usd: None without a price.
        counted_by: the tokenizer, or `estimate`.
        price: in words, with its source and its age.
    """

    model: str
    records: int = 0
    done: int = 0
    failing: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    completion_tokens_at_most: int = 0
    cost_usd: float | None = None
    cost_usd_at_most: float | None = None
    counted_by: str = ""
    price: str = ""

    def add(self, prompt_tokens: int, usual: int, most: int) -> None:
        """Counts a request whose reply has so many tokens."""
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += min(usual, most)
        self.completion_tokens_at_most += most

    def set_price(self, price: Price | None, share: float = 1.0) -> None:
        """Says what all of it costs, at a share of the price."""
        if price is not None:
            sent, most = self.prompt_tokens, self.completion_tokens_at_most
            self.cost_usd = round(share * price.cost_usd(sent, self.completion_tokens), 6)
            self.cost_usd_at_most = round(share * price.cost_usd(sent, most), 6)
            self.price = "" if price is FREE else price.text()

    def as_record(self, model: str, records: str) -> dict[str, Any]:
        """Its values, with other names for the first two."""
        values = asdict(self)
        return {model: values.pop("model"), records: values.pop("records"), **values}


def find_price(model: str, path: Path | None = None) -> Price | None:
    """The price of a model by its name, or by its name without a date (`gpt-4o-2024-08-06`).

    The user's table, at `path`, wins over our own (`prices.toml`).

    Raises:
        RecordError: the user's table is not TOML of the form of ours.
    """
    own = resources.files(__package__).joinpath("prices.toml").read_text("utf-8")
    prices = _table(tomllib.loads(own), "")
    if path is not None:
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise RecordError(f"is not TOML ({error})", where=str(path)) from error
        prices.update(_table(document, str(path)))
    undated = re.sub(r"-(?:\d{4}|\d{6}|\d{8}|\d{4}-\d{2}-\d{2})$", "", model)
    return prices.get(model) or prices.get(undated)


def _table(document: dict[str, Any], source: str) -> dict[str, Price]:
    as_of = document.pop("as_of", None)
    if as_of is not None and type(as_of) is not datetime.date:
        raise RecordError("as_of is no date", where=source, hint="as in as_of = 2026-01-31")
    found = {}
    for model, entry in document.items():
        try:
            price = Price(float(entry["input"]), float(entry["output"]), as_of, source)
            good = 0 <= price.input < float("inf") and 0 <= price.output < float("inf")
        except (TypeError, ValueError, LookupError):
            good = False
        if not good:
            hint = 'as in ["my-judge"] with input = 2.5 and output = 10.0, in USD a million tokens'
            raise RecordError(f"{model!r} has no two prices", where=source, hint=hint)
        found[model] = price
    return found


class Budget:
    """A limit on what is spent: a request starts only where the most it can cost is left."""

    def __init__(self, price: Price, limit_usd: float | None, spent_usd: float, role: Role) -> None:
        self.price = price
        self._role = role
        self.limit_usd = limit_usd
        self.spent_usd = spent_usd
        self._under_way: list[float] = []
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def request(self, prompt_tokens: int, completion_tokens: int) -> AsyncIterator[None]:
        """Holds what a request of at most so many tokens can cost while it is under way.

        Where only what others hold stands in the way, waits for what they really cost.

        Raises:
            ChatBindError: the role's: the request could cross the line.
        """
        most = self.price.cost_usd(prompt_tokens, completion_tokens)
        async with self._changed:
            await self._changed.wait_for(lambda: self.fits(most) or not self._under_way)
            if not self.fits(most):
                raise self.refusal(most)
            self._under_way.append(most)
        try:
            yield
        finally:
            async with self._changed:
                self._under_way.remove(most)
                self._changed.notify_all()

    def pay(self, prompt_tokens: int, completion_tokens: int, share: float = 1.0) -> float:
        """Books what a reply cost, a share of the price, and returns it in USD."""
        cost = share * self.price.cost_usd(prompt_tokens, completion_tokens)
        self.spent_usd += cost
        return cost

    def refusal(self, most: float) -> ChatBindError:
        """What ends a run whose next request may cost so much."""
        return self._role.error(
            f"stopped before the cost limit of {self.limit_usd:g} USD: {self.spent_usd:.4f} USD "
            f"are spent, and what comes next may cost {most:.4f} USD",
            hint=f"what is {self._role.done} is on disk; go on with a higher --max-cost",
        )

    def fits(self, most: float) -> bool:
        """Whether so much may be spent beside what is under way."""
        if self.limit_usd is None:
            return True
        return self.spent_usd + sum(self._under_way) + most <= self.limit_usd

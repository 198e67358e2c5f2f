"""A chat model behind somebody's endpoint: which one, in which role, within which limits.

`hosted_model` asks it. Here is what can be said without the client, which not every run brings.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from chatbind_cli.errors import ChatBindError

KEY_VARIABLE = "OPENAI_API_KEY"

Message = dict[str, str]
"""One message of a chat: its `role` and its `content`."""


class Role(NamedTuple):
    """What a hosted model does here, in the words of messages.

    Attributes:
        name: what its options begin with (`--judge-model`).
        done: what it has done with records.
        error: what is raised where it cannot work.
    """

    name: str
    done: str
    error: type[ChatBindError]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedSettings:
    """Which model is asked, and within which limits.

    Attributes:
        url: the endpoint's address, ending in `/v1`; None for OpenAI's own (`OPENAI_BASE_URL`).
        model: its name there.
        timeout_s: longest wait for one reply.
        retries: further attempts a request.
        tokens_per_minute: sent and received.
        max_cost_usd: the line that is not crossed, None for no line.
        prices: a file of prices, over our own table.
        tokenizer: see `counter_for`.
    """

    url: str | None = None
    model: str | None = None
    timeout_s: float = 120.0
    retries: int = 5
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_cost_usd: float | None = None
    prices: Path | None = None
    tokenizer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswererSettings(HostedSettings):
    """A hosted model that answers questions.

    Attributes:
        contexts: JSONL of what is known of media; None: no question has any.
        concurrency: questions at a time.
    """

    contexts: Path | None = None
    concurrency: int = 8


def refuse_without_key(settings: HostedSettings, role: Role, *, instead: str = "") -> None:
    """Refuses to ask OpenAI's own endpoint without a key; a plan needs none.

    Raises:
        ChatBindError: the role's.
    """
    elsewhere = settings.url or os.environ.get("OPENAI_BASE_URL")
    if not (elsewhere or os.environ.get(KEY_VARIABLE, "").strip()):
        raise role.error(
            f"no API key in {KEY_VARIABLE}",
            hint=f"set {KEY_VARIABLE}, or give --{role.name}-url of a local server{instead}",
        )

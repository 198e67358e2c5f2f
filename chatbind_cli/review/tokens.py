"""How many tokens a text is: counted with a tokenizer, or estimated without one.

Tokenizers of hosted models are not on this machine unless the user has them, so the default is an
estimate that errs on the high side for what judges are sent. Knows nothing of prices.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from chatbind_cli.errors import UsageError

Counter = Callable[[str], int]
ESTIMATE = "estimate"
"""The name of what counts tokens without a tokenizer."""

# Letters in runs, digits in groups of three, everything else one by one, as BPE tokenizers cut.
_PIECE = re.compile(r"[^\W\d_]+|\d{1,3}|[^\w\s]|_|\n+")
_LETTERS_A_TOKEN = 6
_MESSAGE_TOKENS = 4
"""What a chat's form adds to each message (role and marks)."""

_FORM_TOKENS = 16
"""The same at the very most."""


def estimate(text: str) -> int:
    """A text's tokens, a little more than today's tokenizers make of English."""
    total = 0
    for match in _PIECE.finditer(text):
        piece = match[0]
        if piece.isascii():
            total += -(-len(piece) // _LETTERS_A_TOKEN)
        else:
            # Other scripts are cut finer: about two bytes a token at worst.
            total += -(-len(piece.encode()) // 2)
    return total


def counter_for(name: str | None) -> tuple[Counter, str]:
    """What counts tokens, and what to call it.

    Args:
        name: a tokenizer's folder or Hugging Face name, `tiktoken:ENCODING`, or None to estimate.

    Raises:
        CheckpointError: there is no such tokenizer.
        UsageError: tiktoken is asked for and not installed.
    """
    if name is None:
        return estimate, ESTIMATE
    if name.startswith("tiktoken:"):
        return _tiktoken(name.removeprefix("tiktoken:")), name
    from chatbind_cli.model.pretrained import open_tokenizer  # noqa: PLC0415  brings transformers

    tokenizer: Any = open_tokenizer(name)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]), name


def message_tokens(messages: list[Any], count: Counter) -> int:
    """The tokens of a chat's messages."""
    return sum(count(message["content"]) + _MESSAGE_TOKENS for message in messages)


def most_tokens(messages: list[Any], *, beside: str = "") -> int:
    """More than any tokenizer makes of a chat: every token has at least one byte.

    Args:
        messages: the chat.
        beside: what else is sent and counted (the schema of structured output).
    """
    texts = [beside, *(str(message["content"]) for message in messages)]
    return sum(len(text.encode()) for text in texts) + _FORM_TOKENS * len(texts)


def _tiktoken(encoding: str) -> Counter:
    try:
        import tiktoken  # noqa: PLC0415  not everybody has it
    except ImportError as error:
        raise UsageError("tiktoken is not installed", hint="pip install tiktoken") from error
    try:
        coder = tiktoken.get_encoding(encoding)
    except ValueError as error:
        raise UsageError(f"tiktoken knows no encoding {encoding!r}") from error
    return lambda text: len(coder.encode(text, disallowed_special=()))

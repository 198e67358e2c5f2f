"""What went wrong between us and a chat endpoint, in words and in consequences.

Knows nothing of retries or of judging. The key appears in no text that leaves here.
"""

from __future__ import annotations

import email.utils
import math
import time

KEY_VARIABLE = "OPENAI_API_KEY"
_SHORT = 200
_SECRET_AT_LEAST = 12
"""A key that is shorter is a word (`none`, `EMPTY`) that local servers are given."""


def hopeless(error: Exception) -> str | None:
    """What to do about an error that no case will get past; None for any other error."""
    import openai

    if isinstance(error, openai.AuthenticationError):
        return f"check the key in {KEY_VARIABLE}"
    if isinstance(error, openai.PermissionDeniedError):
        return "the key may not use this model"
    if isinstance(error, openai.NotFoundError):
        return "check --judge-model and --judge-url"
    if isinstance(error, openai.RateLimitError) and error.code == "insufficient_quota":
        return "the account has no quota left"
    return None


def may_pass(error: Exception) -> bool:
    """Whether the same request may go well the next time."""
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 425, 429) or error.status_code >= 500
    return True


def is_too_many(error: Exception) -> bool:
    """Whether the server wants fewer requests, or names a time before which it wants none."""
    import openai

    return isinstance(error, openai.RateLimitError) or asked_wait_s(error) > 0


def may_be_charged(error: Exception) -> bool:
    """Whether the server may have done the work although no reply came."""
    import openai

    return not isinstance(error, openai.APIStatusError)


def asked_wait_s(error: Exception) -> float:
    """The seconds that the server asks to wait, 0 where it does not say."""
    import openai

    if not isinstance(error, openai.APIStatusError):
        return 0.0
    headers = error.response.headers
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name, "")
        try:
            seconds = float(text) * unit
        except ValueError:
            continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, IndexError):
        return 0.0


def one_line(error: Exception, *, secret: str, timeout_s: float) -> str:
    """The error on one short line, without the key."""
    import openai

    text = " ".join(str(error).split())
    if isinstance(error, openai.APITimeoutError | TimeoutError):
        text = f"no reply within {timeout_s:g} s"
    elif isinstance(error, openai.APIConnectionError):
        text = f"no connection ({error.__cause__ or error})"
    elif isinstance(error, openai.APIStatusError):
        if text == f"Error code: {error.status_code}":  # words in a form that is not OpenAI's
            text = f"{text} {' '.join(error.response.text.split())}".rstrip()
    else:
        text = f"a reply that cannot be read ({text})"
    text = without_key(text, secret)
    return text if len(text) <= _SHORT else text[: _SHORT - 3] + "..."


def without_key(text: str, secret: str) -> str:
    """The text as it may be shown and written, also where a server has repeated the key in it."""
    return text.replace(secret, "[key]") if len(secret) >= _SECRET_AT_LEAST else text


def shown_cause(error: Exception, *, secret: str) -> Exception | None:
    """What a traceback may name as the cause: not an error whose own words hold the key."""
    text = f"{error!s} {error!r}"
    return error if without_key(text, secret) == text else None

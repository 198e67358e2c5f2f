"""Whole numbers in text that comes from outside: headers, names, the environment."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"[0-9]{1,18}", re.ASCII)


def whole_number(text: str) -> int | None:
    """The number that a text is, None where it is none that fits 63 bits.

    `str.isdigit` also takes "²", which `int` refuses, and a line of digits as long as you like.
    """
    return int(text) if _NUMBER.fullmatch(text) else None

"""CLIP's byte pairs, which the text towers of encoders read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from chatbind_cli.errors import ChatBindError


def tokenize(texts: Sequence[str], context: int) -> torch.Tensor:
    """Returns the ids of CLIP's byte pairs, int64 [n, context]: start, text, end-of-text, zeros.

    Longer texts are cut; the last place is then the end-of-text token.

    Raises:
        ChatBindError: open_clip_torch is not installed.
    """
    try:
        from open_clip.tokenizer import SimpleTokenizer  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ChatBindError(
            "texts need CLIP's tokenizer, which is not installed",
            hint="pip install 'chatbind[text]'",
        ) from error
    ids: torch.Tensor = _made(SimpleTokenizer)(list(texts), context_length=context)
    return ids


@cache
def _made(tokenizer: Callable[[], Any]) -> Any:
    """A tokenizer, whose vocabulary takes a while to read."""
    return tokenizer()

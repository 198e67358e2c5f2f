"""CLIP's byte pairs, which the text towers of encoders read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from chatbind_cli.errors import ChatBindError


def tokenize(texts: Sequence[str], context: int, *, as_transformers: bool = False) -> torch.Tensor:
    """Returns the ids of CLIP's byte pairs, int64 [n, context]: start, text, end-of-text, padding.

    Longer texts are cut; the last place is then the end-of-text token.

    Args:
        texts: to be read in lower case.
        context: places.
        as_transformers: fill up with the end-of-text token and leave `&amp;` as it is. CLIP's own
            tokenizer fills up with zeros and takes `&amp;` for `&`.

    Raises:
        ChatBindError: open_clip_torch is not installed.
    """
    try:
        import open_clip.tokenizer as clip  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ChatBindError(
            "texts need CLIP's tokenizer, which is not installed",
            hint="pip install 'chatbind[text]'",
        ) from error
    tokenizer = _tokenizer(clip, not as_transformers)
    ids: torch.Tensor = tokenizer(list(texts), context_length=context)
    if as_transformers:
        end = ids.argmax(dim=1, keepdim=True)
        ids[torch.arange(context) > end] = tokenizer.eot_token_id
    return ids


@cache
def _tokenizer(clip: Any, unescape: bool) -> Any:
    """A tokenizer of open_clip's module, whose vocabulary takes a while to read."""
    made = clip.SimpleTokenizer()
    if not unescape:
        made.clean_fn = lambda text: clip.whitespace_clean(clip.ftfy.fix_text(text)).lower()
    return made

"""CLIP's byte-pair encoding, which ImageBind's text tower reads.

The vocabulary comes from open_clip_torch (extra `text`), which is imported at first use.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chatbind_cli.encoders.imagebind.config import TEXT_CONTEXT
from chatbind_cli.errors import ChatBindError


def tokenize(texts: Sequence[str]) -> torch.Tensor:
    """Returns CLIP's token ids, int64 [n, 77]: start, text, end-of-text, zeros.

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
    if not texts:
        return torch.zeros(0, TEXT_CONTEXT, dtype=torch.long)
    return SimpleTokenizer()(list(texts), context_length=TEXT_CONTEXT)

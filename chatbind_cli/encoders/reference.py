"""What `--encoder` may say: a path, or a name under a scheme, as `hf:owner/name`."""

from __future__ import annotations

import re
from pathlib import Path

_REFERENCE = re.compile(r"[A-Za-z][\w.-]{0,30}:[^\0]{1,200}")


def is_reference(word: str | Path) -> bool:
    """Whether a word names an encoder under a scheme; what exists as a path is a path."""
    return _REFERENCE.fullmatch(str(word)) is not None and not Path(word).exists()

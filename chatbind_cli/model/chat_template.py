"""Chat templates, rendered where their loops and their memory hurt nobody.

A template is rendered with a mark in place of each content, so what users write never passes
through it, and one rendering serves every conversation of the same turns.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from chatbind_cli.errors import CheckpointError

_CHILD = Path(__file__).with_name("template_child.py")
_SECONDS = 30.0  # for a machine that has other work; the child's own limit is 2 of the processor's
_LONGEST_TEMPLATE = 1 << 20
_HINT = "choose another --prompt-style"


def render_marked(tokenizer: Any, roles: Sequence[str]) -> tuple[str, list[str]]:
    """A conversation in the words of the tokenizer's chat template.

    The roles are `system`, `user` or `assistant`, turn by turn. Models that may think aloud are
    told not to: what is learned of an answer is the answer.

    Returns:
        The text, and the mark that stands in it for each turn's content.

    Raises:
        CheckpointError: there is no template, or it cannot be rendered.
    """
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    where = getattr(tokenizer, "name_or_path", None) or None
    if not template or not isinstance(template, str):
        raise CheckpointError("the tokenizer has no chat template", where=where, hint=_HINT)
    if len(template) > _LONGEST_TEMPLATE:
        raise CheckpointError("the chat template is larger than any", where=where, hint=_HINT)
    special = tuple(sorted(tokenizer.special_tokens_map.items()))
    text, problem = _rendered(template, special, tuple(roles))
    if problem:
        raise CheckpointError(f"the chat template {problem}", where=where, hint=_HINT)
    return text, _marks(len(roles))


def _marks(count: int) -> list[str]:
    return [f"\ue000{index}\ue001" for index in range(count)]


@lru_cache(maxsize=1024)
def _rendered(
    template: str, special: tuple[tuple[str, str], ...], roles: tuple[str, ...]
) -> tuple[str, str]:
    """The text, or why there is none; a failure is remembered, too, since it takes seconds."""
    variables = {
        **dict(special),
        "messages": [
            {"role": role, "content": mark}
            for role, mark in zip(roles, _marks(len(roles)), strict=True)
        ],
        "tools": None,
        "documents": None,
        "add_generation_prompt": False,
        "enable_thinking": False,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(_CHILD)],
            input=json.dumps({"template": template, "variables": variables}),
            capture_output=True,
            encoding="utf-8",
            timeout=_SECONDS,
            check=True,
        )
        outcome = json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError):
        return "", "takes more time or memory than a prompt may"
    if "error" in outcome:
        reason = outcome["error"].strip().partition("\n")[0][:200]
        return "", f"cannot be rendered ({reason})"
    return outcome["text"], ""

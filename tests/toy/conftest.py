"""`chatbind toy`, called in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner


def _run_toy(*words: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, records and stderr of `chatbind toy`."""
    from chatbind_cli.commands.toy import command

    result = CliRunner().invoke(command, list(words))
    records = [json.loads(line) for line in result.stdout.splitlines()]
    problem = "" if result.exception is None else str(result.exception)
    return result.exit_code, records, problem


RunToy = Callable[..., tuple[int, list[dict[str, Any]], str]]


@pytest.fixture(scope="session")
def run_toy() -> RunToy:
    """Calls `chatbind toy` with some words."""
    return _run_toy

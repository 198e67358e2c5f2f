"""`chatbind toy`, called in this process."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner


def run_toy(*words: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, records and stderr of `chatbind toy`."""
    from chatbind_cli.commands.toy import command

    result = CliRunner().invoke(command, list(words))
    records = [json.loads(line) for line in result.stdout.splitlines()]
    problem = "" if result.exception is None else str(result.exception)
    return result.exit_code, records, problem

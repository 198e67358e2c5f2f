"""JSON objects of other people's folders: configs, indexes, tokenizer files.

A file is bounded before it is parsed, by its bytes and by the number of its containers, which are
what takes memory: at most half a gigabyte, whatever it holds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chatbind_cli.errors import CheckpointError

MOST_BYTES = 40 << 20  # the largest tokenizer.json of a published model has 32 MiB
_MOST_CONTAINERS = 1_200_000  # twice those of the same


def read_json(
    path: Path, *, missing_ok: bool = False, most_bytes: int = MOST_BYTES
) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing (unless `missing_ok`), too large to be what it should
            be, or not a JSON object.
    """
    if missing_ok and not path.is_file():
        return {}
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
        if len(data) > most_bytes:
            raise ValueError(f"more than {most_bytes >> 20} MiB")
        if data.count(b"[") + data.count(b"{") > _MOST_CONTAINERS:
            raise ValueError(f"more than {_MOST_CONTAINERS:,} brackets")
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot be read as JSON ({error})", where=str(path)) from error
    if not isinstance(value, dict):
        raise CheckpointError("is not a JSON object", where=str(path))
    return value


def _constant(name: str) -> float:
    """Infinity is a limit that is off; what is not a number limits nothing and spoils every sum."""
    if name == "NaN":
        raise ValueError("NaN is not a number")
    return float(name)

"""What a review has cost so far, request by request, on the disk before a reply is used.

Review records tell what they cost, too; but a reply whose review is never written (a kill, a
second question that the cost limit forbids, `--on-error skip`) is paid all the same, and
`--max-cost` is to know it. Knows nothing of requests.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path


class PaidLog:
    """The file `.OUTPUT.paid.jsonl` beside a review file; it is there once something was paid.

    Args:
        output: the review file.
    """

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(f".{output.name}.paid.jsonl")

    def forget(self) -> None:
        """Starts anew, as the review file does."""
        self.path.unlink(missing_ok=True)

    def total_usd(self) -> float:
        """All of it; half a line of a run that was killed counts for nothing."""
        total = 0.0
        with suppress(OSError), self.path.open(encoding="utf-8") as file:
            for line in file:
                with suppress(ValueError, TypeError, KeyError):
                    total += float(json.loads(line)["usd"])
        return total

    def add(self, usd: float) -> None:
        """Notes a payment."""
        if usd <= 0:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"usd": round(usd, 10)}) + "\n")

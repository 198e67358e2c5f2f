"""How long `chatbind --help` and every `chatbind COMMAND --help` take: median of N runs.

The physical limit is the start of the interpreter itself, measured in the same run; what lies
above it is click and our own modules. Prints one JSON object a line.

    python benchmarks/startup.py [N]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from chatbind_cli.cli import COMMANDS

LIMIT_MS = {"--help": 150.0, "COMMAND --help": 200.0}


def median_ms(line: list[str], n: int) -> float:
    """Median wall time of a command in milliseconds, after one run to warm the file cache."""
    times = []
    for _ in range(n + 1):
        start = time.perf_counter()
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times[1:]), 1)


def main() -> None:
    """Measures and prints."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    program = str(Path(sys.executable).with_name("chatbind"))
    floor = median_ms([sys.executable, "-c", "pass"], n)
    print(json.dumps({"what": "python -c pass", "median_ms": floor, "n": n}))
    for words in [["--help"], *([name, "--help"] for name in COMMANDS)]:
        took = median_ms([program, *words], n)
        limit = LIMIT_MS["--help" if len(words) == 1 else "COMMAND --help"]
        record = {"what": " ".join(["chatbind", *words]), "median_ms": took, "limit_ms": limit}
        print(json.dumps({**record, "times_python": round(took / floor, 1), "n": n}), flush=True)


if __name__ == "__main__":
    main()

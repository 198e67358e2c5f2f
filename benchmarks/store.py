"""Measures an embedding store of CC3M-595K's size: writing, bytes, opening, look-ups, memory.

    python benchmarks/store.py [--rows 595375] [--dim 1024] [--folder DIR]

Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.files import sha256_text

CC3M_ROWS = 595_375
CC3M_BUDGET_BYTES = 1.45e9


def name_of(number: int) -> str:
    """Returns a name as CC3M's pictures have it."""
    return f"GCC_train_{number * 5:09d}.jpg"


def show(what: str, **figures: float | str) -> None:
    """Prints one figure."""
    print(json.dumps({"benchmark": "store", "what": what, **figures}), flush=True)


def seconds(work: Callable[[], object]) -> float:
    """Returns how long a piece of work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_mib() -> float:
    """Returns the largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_append(folder: Path, dim: int, rows: int) -> None:
    """Appends rows one by one in the shuffled order of a training file, as `encode` does."""
    vector = torch.randn(dim)
    numbers = random.Random(0).sample(range(rows), rows)

    def append() -> None:
        with EmbeddingStore.open(folder, "a", encoder_sha256="0" * 64, dim=dim) as store:
            for number in numbers:
                name = name_of(number)
                store.add(name, "image", sha256_text(name), "image/v1", vector)

    took = seconds(append)
    show("append", rows=rows, seconds=round(took, 2), rows_per_second=round(rows / took))


def measure_reading(folder: Path, rows: int) -> None:
    """Reads a large store."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    full = size * CC3M_ROWS / rows
    show("size", rows=rows, bytes=size, bytes_per_row=round(size / rows, 1))
    show("size of CC3M-595K", bytes=round(full), budget=CC3M_BUDGET_BYTES)

    before = peak_mib()
    opened: list[EmbeddingStore] = []
    took = seconds(lambda: opened.append(EmbeddingStore.open(folder)))
    show("open", rows=rows, seconds=round(took, 4))
    show("memory of opening", mib=round(peak_mib() - before, 1))
    store = opened[0]
    show("kinds of rows", seconds=round(seconds(store.kinds), 3))
    wanted = [name_of(n) for n in random.Random(1).choices(range(rows), k=10_000)]
    took = seconds(lambda: [store.get("image", name=name) for name in wanted])
    show("look-up by name, with its vector", microseconds=round(took / len(wanted) * 1e6, 1))
    store.close()


def main() -> None:
    """Runs all measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=CC3M_ROWS)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure_append(Path(folder) / "short", options.dim, 20_000)
        measure_append(Path(folder) / "large", options.dim, options.rows)
        measure_reading(Path(folder) / "large", options.rows)


if __name__ == "__main__":
    main()

"""Measures an embedding store of CC3M-595K's size: bytes, opening, look-ups, memory.

    python benchmarks/store.py [--rows 595375] [--dim 1024] [--folder DIR]

Prints one JSON object a line. Writes shards directly, since only `append` measures the writer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from chatbind_cli.data.store import ROWS_PER_SHARD, EmbeddingStore
from chatbind_cli.data.store_shard import Entry, write_shard

CC3M_ROWS = 595_375
CC3M_BUDGET_BYTES = 1.3e9


def entry(number: int) -> Entry:
    """Returns a row named as CC3M's pictures are."""
    name = f"GCC_train_{number * 5:09d}.jpg"
    return Entry(name, "image", hashlib.sha256(name.encode()).hexdigest(), "image/v1")


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
    """Appends rows one by one, as `encode` does."""
    vector = torch.randn(dim)

    def append() -> None:
        with EmbeddingStore.open(folder, "a", encoder_sha256="0" * 64, dim=dim) as store:
            for number in range(rows):
                made = entry(number)
                store.add(made.name, "image", made.content_sha256, made.fingerprint, vector)

    took = seconds(append)
    show("append", rows=rows, seconds=round(took, 2), rows_per_second=round(rows / took))


def measure_store(folder: Path, dim: int, rows: int) -> None:
    """Makes a large store and reads it."""
    EmbeddingStore.open(folder, "a", encoder_sha256="0" * 64, dim=dim).close()
    vectors = torch.randn(ROWS_PER_SHARD, dim).half()
    for shard, start in enumerate(range(0, rows, ROWS_PER_SHARD)):
        entries = [entry(number) for number in range(start, min(start + ROWS_PER_SHARD, rows))]
        write_shard(folder / f"shard-{shard:05d}.safetensors", entries, vectors[: len(entries)])
    size = sum(path.stat().st_size for path in folder.iterdir())
    full = size * CC3M_ROWS / rows
    show("size", rows=rows, bytes=size, bytes_per_row=round(size / rows, 1))
    show("size of CC3M-595K", bytes=round(full), budget=CC3M_BUDGET_BYTES)

    before = peak_mib()
    opened: list[EmbeddingStore] = []
    show("open", rows=rows, seconds=round(seconds(lambda: opened.append(_open(folder))), 3))
    show("memory of opening", mib=round(peak_mib() - before, 1))
    store = opened[0]
    wanted = [entry(n).name for n in random.Random(0).choices(range(rows), k=10_000)]
    took = seconds(lambda: [store.get("image", name=name) for name in wanted])
    show("look-up by name, with its vector", microseconds=round(took / len(wanted) * 1e6, 1))


def _open(folder: Path) -> EmbeddingStore:
    return EmbeddingStore.open(folder)


def main() -> None:
    """Runs all measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=CC3M_ROWS)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure_append(Path(folder) / "appended", options.dim, 20_000)
        measure_store(Path(folder) / "large", options.dim, options.rows)


if __name__ == "__main__":
    main()

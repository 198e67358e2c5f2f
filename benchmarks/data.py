"""How long training data of CC3M-595K's size take to the first record, and how fast samples come.

    python benchmarks/data.py [--records 595375] [--folder DIR]

Makes so many conversations of a question and a caption of about ten words, a store of embeddings of
all their media, and a tiny language model; then runs `pretrain` for one step with one and two
processes, for the first time and again. `seconds` are to the first record on standard output,
`core_seconds` what all processes have computed until then (other work on the machine stretches the
former), `..._of_few` the same with 64 conversations. `mib` is the most that a process takes beyond
what it takes with so few; of that `shared_mib` are pages of files, which all processes share. The
samples of a second are counted without a model, as training reads them: parsed, as tokens, with
embeddings, in batches of 32, in this process and by two workers. Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from word_tokenizer import word_tokenizer

from chatbind_cli.data.checked import checked_file
from chatbind_cli.data.conversations import Conversations
from chatbind_cli.data.lookup import Embeddings, WideEmbeddings, open_stores
from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.data.tokens import PromptEncoder
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.model.assemble import read_without_weights
from chatbind_cli.training.batches import Share, StepSampler, StepSamples, step_loader, tensors
from chatbind_cli.training.positions import WithPositions
from chatbind_cli.training.samples import Collator, TrainingSamples

ROOT = Path(__file__).parent.parent
CC3M_RECORDS = 595_375
FEW = 64
DIM = 64
WORDS = 5000
ASKED = ["Summarize the visual content of the image.", "What is this?", "Describe it in brief."]
SAMPLES, BATCH = 100_000, 32


def name_of(number: int) -> str:
    """The name of a picture as CC3M has them."""
    return f"GCC_train_{number:09d}.jpg"


def conversation(number: int, draw: random.Random) -> dict[str, Any]:
    """A record as LLaVA's file has them."""
    asked = f"{draw.choice(ASKED)}\n<image>"
    said = " ".join(f"w{draw.randrange(WORDS)}" for _ in range(max(3, round(draw.gauss(10, 3)))))
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
    return {"id": f"{number:09d}", "image": name_of(number), "conversations": turns}


def make_world(folder: Path, records: int) -> None:
    """Conversations (all, and a few), the store, and the language model."""
    draw = random.Random(0)
    for name, count in (("all.json", records), ("few.json", FEW)):
        with (folder / name).open("w") as file:
            file.write("[\n")
            for number in range(count):
                file.write(",\n" if number else "")
                file.write(json.dumps(conversation(number, draw), indent=2))
            file.write("\n]\n")

    noise = np.random.default_rng(0)

    made = {"encoder_sha256": "ab" * 32, "encoder_name": "random", "dim": DIM}
    with EmbeddingStore.open(folder / "store", "a", **made) as store:
        for number in range(records):
            numbers = torch.from_numpy(noise.standard_normal(DIM, np.float32))
            store.add(name_of(number), "image", f"{number:064x}", "image/v1", numbers)
    tokenizer = word_tokenizer(("#", "Human", ":", *(f"w{number}" for number in range(WORDS))))
    tokenizer.save_pretrained(folder / "model")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, **shape)
    LlamaForCausalLM(config).save_pretrained(folder / "model")


def processes_of(root: int) -> Iterator[tuple[int, int, float]]:
    """Of a process and all below it: the most it has held and files' pages, KiB; core seconds."""
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(root)
        for process in [first, *first.children(recursive=True)]:
            with suppress(psutil.Error, OSError, KeyError):  # it has ended
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                values = dict(line.split(":", 1) for line in lines)
                most, of_files = (int(values[name].split()[0]) for name in ("VmHWM", "RssFile"))
                yield most, of_files, sum(process.cpu_times()[:2])


def run(folder: Path, data: str, processes: int) -> dict[str, float]:
    """One step of the real command: seconds to the first record, the largest process in MiB."""
    line = [sys.executable, "-m", "chatbind_cli", "pretrain", "-m", str(folder / "model")]
    line += ["--data", str(folder / data), "--store", str(folder / "store"), "--device", "cpu"]
    line += ["-o", str(folder / "out"), "--overwrite", "--save-strategy", "no", "--max-steps", "1"]
    line += ["--num-processes", str(processes), "--per-device-train-batch-size", "16"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    start = time.perf_counter()
    child = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment)
    peaks = [(0, 0, 0.0)]

    def watch() -> None:
        while child.poll() is None:
            peaks.extend(processes_of(child.pid))
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert child.stdout is not None
    first = child.stdout.readline()
    seconds = time.perf_counter() - start
    core = sum(cpu for _, _, cpu in processes_of(child.pid))
    child.communicate()
    watcher.join()
    if child.returncode != 0 or "loss" not in first:
        raise SystemExit(f"pretrain ended with {child.returncode}")
    largest, shared, _ = max(peaks)
    return {
        "seconds": seconds,
        "core_seconds": core,
        "mib": largest / 1024,
        "shared_mib": shared / 1024,
    }


def measure_samples(folder: Path) -> None:
    """The samples that a loader without a model gives in a second."""
    tokenizer, config = read_without_weights(folder / "model")
    samples = TrainingSamples(
        Conversations.of_files([checked_file(folder / "all.json")]),
        PromptEncoder(tokenizer, config),
        WideEmbeddings([Embeddings(open_stores(folder / "store"), MediaOptions())], [DIM]),
        2048,
    )
    padded = WithPositions(
        Collator(tokenizer.pad_token_id or 0), config, at_labels=True, frozen=True
    )
    share, sizes = Share(samples=BATCH), samples.conversations.sizes()
    steps = StepSamples(samples, padded, share, sizes)
    count = min(SAMPLES // BATCH, len(samples) // BATCH)
    for workers in (0, 2):
        made = iter(step_loader(steps, StepSampler(len(samples), BATCH, seed=0), workers, 0))
        for step in islice(made, count // 10):  # until all is warm
            tensors(step["passes"], pin=False)
        start = time.perf_counter()
        for step in islice(made, count - count // 10):
            tensors(step["passes"], pin=False)
        rate = (count - count // 10) * BATCH / (time.perf_counter() - start)
        print(json.dumps({"workers": workers, "samples_per_s": round(rate)}), flush=True)


def main() -> None:
    """Makes the data, and measures."""
    parser = argparse.ArgumentParser(description="Training data to the first record.")
    parser.add_argument("--records", type=int, default=CC3M_RECORDS)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary one")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=asked.folder) as place:
        folder = Path(place)
        make_world(folder, asked.records)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        for processes in (1, 2):
            few = run(folder, "few.json", processes)
            for again in (False, True):
                if not again:
                    for kept in (folder / "cache").glob("chatbind/*/*"):
                        kept.unlink()
                found = run(folder, "all.json", processes)
                record = {"processes": processes, "again": again, "records": asked.records}
                for key in ("seconds", "core_seconds"):
                    record |= {key: round(found[key], 1), f"{key}_of_few": round(few[key], 1)}
                record |= {key: round(found[key] - few[key]) for key in ("mib", "shared_mib")}
                print(json.dumps(record), flush=True)
        measure_samples(folder)


if __name__ == "__main__":
    main()

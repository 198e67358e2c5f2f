"""Encoders of every kind at their published sizes: start-up, memory, and seconds a picture.

    python benchmarks/encoders.py [--kinds clip languagebind ...] [--pictures 20]

Weights are random. For every tower a process of its own opens the encoder and reads that tower:
seconds, the share of the file's bytes that it holds, and resident memory above that of the imports
(mapped pages counted apart). The limit is the tower's own bytes. Then pictures, read and encoded
one by one by the encoder and by transformers' (timm's) own processor and model in turns, whose
results are compared too. Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from encoding.kinds import KINDS, See
from PIL import Image
from torch import nn

from chatbind_cli.encoders.encoder import load_media
from chatbind_cli.encoders.opening import open_encoder

MIB = 2**20


def resident() -> dict[str, float]:
    """MiB of this process, and of those what is mapped from files."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    said = {line.split(":")[0]: float(line.split()[1]) / 1024 for line in lines if "Rss" in line}
    return {"own_mib": round(said["RssAnon"]), "mapped_mib": round(said["RssFile"])}


def measure_tower(folder: Path, modality: str) -> None:
    """Opens the encoder and reads one tower; the imports are done before."""
    for word in ("huggingface.image_towers", "languagebind.encoder", "imagebind.encoder"):
        __import__(f"chatbind_cli.encoders.{word}")
    before, begin = resident(), time.perf_counter()
    encoder = open_encoder(folder)
    opened = time.perf_counter() - begin
    tower = encoder.tower(modality)
    loaded = time.perf_counter() - begin
    numbers = sum(p.nbytes for p in tower.parameters())
    found = {key: value - before[key] for key, value in resident().items()}
    found |= {"open_s": round(opened, 2), "load_s": round(loaded, 2)}
    print(json.dumps({"modality": modality, "tower_mib": round(numbers / MIB), **found}))


def towers(kind: str, folder: Path) -> None:
    """Every tower in a process of its own."""
    file = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    for modality in open_encoder(folder).modalities:
        line = [sys.executable, __file__, "--tower", str(folder), modality]
        done = subprocess.run(line, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps({"encoder": kind, "file_mib": round(file / MIB), **found}), flush=True)


@torch.inference_mode()
def pictures(kind: str, folder: Path, theirs: See, count: int) -> None:
    """One by one by both, in turns."""
    encoder, path = open_encoder(folder), folder / "picture.jpg"
    random = np.random.default_rng(0)
    took: dict[str, list[float]] = {"chatbind": [], "other": []}
    least = 1.0
    for number in range(count + 1):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)
        begin = time.perf_counter()
        own = encoder.embed([load_media(encoder.read, path, "image")], normalize=True)
        middle = time.perf_counter()
        other = theirs(Image.open(path).convert("RGB"))
        end = time.perf_counter()
        if number:  # the first one reads towers
            took["chatbind"].append(middle - begin)
            took["other"].append(end - middle)
        least = min(least, float(nn.functional.cosine_similarity(own, other.float())))
    found = {f"{name}_s": round(statistics.median(times), 4) for name, times in took.items()}
    ratio = round(found["chatbind_s"] / found["other_s"], 3)
    print(json.dumps({"encoder": kind, **found, "ratio": ratio, "least_cosine": round(least, 6)}))


def main() -> None:
    """Makes each encoder, measures it, and deletes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--pictures", type=int, default=10)
    parser.add_argument("--tower", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.tower:
        measure_tower(Path(asked.tower[0]), asked.tower[1])
        return
    transformers.utils.logging.set_verbosity_error()  # of keys that a model without texts lacks
    transformers.utils.logging.disable_progress_bar()
    for kind in asked.kinds:
        save, theirs = KINDS[kind]
        with tempfile.TemporaryDirectory() as name:
            save(Path(name) / kind)
            towers(kind, Path(name) / kind)
            if theirs is not None:
                pictures(kind, Path(name) / kind, theirs(Path(name) / kind), asked.pictures)


if __name__ == "__main__":
    main()

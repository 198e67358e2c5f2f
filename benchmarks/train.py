"""How fast both stages train: with everything on, with each switch off, with all of them off.

    python benchmarks/train.py                    # 218M parameters on the CPU, float32 and bfloat16
    python benchmarks/train.py --preset 7b        # one GPU; the models are random weights

Every line is one run of the real command on the same data: `samples_per_s`, `tokens_per_s` (no
padding, no constant prefix), `mfu` where the device's peak is known, the highest memory, the share
of time that waited for data, and `times`: how many times as fast as with all switches off.
Lengths are those of LLaVA's files: captions of COCO (401 of them: 14.0 tokens, deviation 3.6),
questions and answers of LLaVA's evaluation (30 each: conversation 11.5 and 22.2 tokens, detail 9.6
and 104, complex 15.8 and 146), mixed as in LLaVA-Instruct (58, 23 and 77 thousand, 4.4 pairs in a
conversation).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from word_tokenizer import word_tokenizer

from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.encoders.imagebind.config import ImageBindConfig
from chatbind_cli.encoders.imagebind.model import ImageBind

ROOT = Path(__file__).parent.parent
WORDS = 31_000
DIM = 1024
COMMON = {"vocab_size": 32_000, "max_position_embeddings": 2048, "bos_token_id": 1}
COMMON |= {"eos_token_id": 2, "tie_word_embeddings": False}
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "model": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12},
        "heads": 16,
        "dtypes": ("float32", "bfloat16"),
        "pretrain": {"per-device-train-batch-size": 16, "max-steps": 6},
        "finetune": {"per-device-train-batch-size": 4, "max-steps": 6},
    },
    "7b": {
        "model": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32},
        "heads": 32,
        "dtypes": ("bfloat16",),
        "pretrain": {"per-device-train-batch-size": 128, "max-steps": 24},
        "finetune": {"per-device-train-batch-size": 32, "max-steps": 12},
    },
}
SWITCHES = {
    "pretrain": ("share-prefix", "loss-at-labels", "group-by-length"),
    "finetune": ("packing", "loss-at-labels"),
}
WARM_UP = 2  # steps that are not counted


def conversation(stage: str, draw: random.Random) -> list[dict[str, str]]:
    """Turns of a conversation about a picture, of words that are one token each."""

    def text(mean: float, deviation: float) -> str:
        n = max(3, round(draw.gauss(mean, deviation)))
        return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(n))

    if stage == "pretrain":
        pairs = [(text(6, 2), text(14.0, 3.6))]
    else:
        kind = draw.choices(("conv", "detail", "complex"), (58, 23, 77))[0]
        if kind == "conv":
            n = draw.choice((3, 4, 4, 5, 6))
            pairs = [(text(11.5, 2.3), text(22.2, 11.7)) for _ in range(n)]
        elif kind == "detail":
            pairs = [(text(9.6, 2.2), text(104.0, 24.0))]
        else:
            pairs = [(text(15.8, 3.7), text(146.0, 36.0))]
    turns = [
        t for q, a in pairs for t in ({"from": "human", "value": q}, {"from": "gpt", "value": a})
    ]
    turns[0]["value"] += "\n<image>"
    return turns


def make_world(folder: Path, preset: dict[str, Any]) -> None:
    """A random language model, its tokenizer of one token a word, conversations, embeddings."""
    system = "A chat between curious human and an artificial intelligence assistant . The gives"
    system += " helpful , detailed polite answers to the ' s questions ### : Human Assistant"
    tokenizer = word_tokenizer((*system.split(), *(f"w{n}" for n in range(WORDS))))
    tokenizer.save_pretrained(folder / "model")
    heads = preset["heads"]
    config = LlamaConfig(**COMMON, **preset["model"], num_attention_heads=heads)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", file=sys.stderr)
    model.save_pretrained(folder / "model")
    draw = random.Random(0)
    for stage in ("pretrain", "finetune"):
        records = [
            {"id": n, "image": f"{n % 500}.jpg", "conversations": conversation(stage, draw)}
            for n in range(4000)
        ]
        (folder / f"{stage}.json").write_text(json.dumps(records))
    made_by = {"encoder_sha256": "ab" * 32, "encoder_name": "random", "dim": DIM}
    with EmbeddingStore.open(folder / "store", "a", **made_by) as store:
        for n in range(500):
            store.add(f"{n}.jpg", "image", f"{n:064x}", "image/v1", torch.randn(DIM))


def run(folder: Path, stage: str, dtype: str, size: dict[str, int], words: list[str]) -> dict:
    """One run of a stage; its rates without the first steps."""
    line = [sys.executable, "-m", "chatbind_cli", stage, "-m", str(folder / "model")]
    line += ["--data", str(folder / f"{stage}.json"), "--store", str(folder / "store")]
    line += ["-o", str(folder / f"out-{stage}"), "--overwrite", "--save-strategy", "no"]
    line += ["--gradient-accumulation-steps", "1", "--bf16", str(dtype == "bfloat16")]
    line += [word for name, n in size.items() for word in (f"--{name}", str(n))]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    done = subprocess.run(
        [*line, *words],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CHATBIND_QUIET": "1"},
    )
    log = [json.loads(record) for record in done.stdout.splitlines()]
    counted = [r for r in log if r.get("step", 0) > WARM_UP and "loss" in r]
    # rates are of one step each: times add up, rates do not
    seconds = [1 / r["samples_per_s"] for r in counted]
    mean = {
        key: sum(r[key] * s for r, s in zip(counted, seconds, strict=True)) / sum(seconds)
        for key in ("tokens_per_s", "data_wait", "mfu")
        if key in counted[0]
    }
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    memory = {"rss_gib": round(peak / 2**20, 2)} if peak > before else {}
    if "gpu_memory_gib" in counted[-1]:
        memory = {"gpu_memory_gib": counted[-1]["gpu_memory_gib"]}
    rates = {"samples_per_s": len(counted) / sum(seconds), **mean}
    return {k: float(f"{v:.4g}") for k, v in rates.items()} | memory


def encoded_per_s(preset: str) -> float:
    """Pictures a second that ImageBind-Huge encodes on this device, for training that does."""
    device = torch.device("cuda" if preset == "7b" else "cpu")
    n = 64 if preset == "7b" else 2
    with device:
        encoder = ImageBind(ImageBindConfig(), modalities=["image"]).to(torch.bfloat16).eval()
        pictures = torch.zeros(n, 3, 224, 224, dtype=torch.bfloat16)
    for _ in range(3 if preset == "7b" else 2):  # the first to get warm
        began = time.monotonic()
        with torch.no_grad():
            float(encoder({"image": pictures})["image"].sum())
        seconds = time.monotonic() - began
    return n / seconds


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--stage", choices=SWITCHES, action="append")
    parser.add_argument("--dtype", action="append", help="default: those of the preset")
    parser.add_argument("--no-encoder", action="store_true", help="do not time the encoder")
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    encoder = None if args.no_encoder else encoded_per_s(args.preset)
    if encoder:
        print(json.dumps({"figure": "encode", "pictures_per_s": float(f"{encoder:.4g}")}))
    with tempfile.TemporaryDirectory(prefix="chatbind-train-") as name:
        folder = Path(name)
        make_world(folder, preset)
        for stage in args.stage or SWITCHES:
            for dtype in args.dtype or preset["dtypes"]:
                compare(folder, stage, dtype, preset[stage], encoder)


def compare(
    folder: Path, stage: str, dtype: str, size: dict[str, int], encoder: float | None
) -> None:
    """One stage with each set of switches."""
    off = [word for name in SWITCHES[stage] for word in (f"--{name}", "no")]
    runs = {"all off": off, "all on": []}
    runs |= {f"without {name}": [f"--{name}", "no"] for name in SWITCHES[stage]}
    runs["with compile"] = ["--compile", "yes"]
    runs["reference"] = [*off, "--gradient-checkpointing", "yes"]
    base = None
    for name, words in runs.items():
        rates = run(folder, stage, dtype, size, words)
        if name == "reference" and encoder:
            # it encodes every picture again each time it is seen
            rates["samples_per_s"] = 1 / (1 / rates["samples_per_s"] + 1 / encoder)
        base = base or rates["samples_per_s"]
        times = {"times": round(rates["samples_per_s"] / base, 2)}
        print(
            json.dumps({"figure": stage, "dtype": dtype, "run": name} | rates | times), flush=True
        )


if __name__ == "__main__":
    main()

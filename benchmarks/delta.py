"""Measures `apply-delta` beside `cp`: seconds, peak memory; one JSON object a line.

    python benchmarks/delta.py                  scaled runs, then LLaMA-7B in full
    python benchmarks/delta.py --only scaled    a few layers of 7B and 13B: memory must not grow

Base and delta have the shapes of LLaMA and random float16 numbers, in the published layout (three
shards, no hashes). Before each measured step its inputs are dropped from the page cache, so both
`apply-delta` and `cp` read from the disk. `apply-delta` syncs what it writes; `cp` does not, so its
time is given without and with a `sync`. What is made is removed again.

The limits: two reads and one write against cp's one and one make 1.5 where the disk is the
narrowest place. For the processor, a GiB of result is 1.8 s of SHA-256 (one core with SHA
instructions; base, delta and result), 0.25 s of float16 sums, and the kernel's copying of 2 GiB in;
cp has its kernel copy 2 GiB in all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from chatbind_cli.checkpoints.output_folder import index_of, plan_shards
from chatbind_cli.checkpoints.safetensors_file import SafetensorsWriter, TensorInfo

FULL_RUN_WANTS_BYTES = 60e9
BASE_WORDS, DELTA_WORDS = 32_000, 32_004
POOL = 1 << 23


@dataclass(frozen=True)
class Shape:
    """A LLaMA, perhaps with fewer layers than it has."""

    name: str
    hidden: int
    intermediate: int
    layers: int

    def tensors(self, words: int, *, projector: bool) -> dict[str, TensorInfo]:
        """Names and shapes; rows of the vocabulary and the projector as a delta has them."""
        h, m = self.hidden, self.intermediate
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, h)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            shapes |= {f"{prefix}self_attn.{kind}_proj.weight": (h, h) for kind in "qkvo"}
            shapes |= {f"{prefix}mlp.{kind}_proj.weight": (m, h) for kind in ("gate", "up")}
            shapes[f"{prefix}mlp.down_proj.weight"] = (h, m)
            shapes[f"{prefix}input_layernorm.weight"] = (h,)
            shapes[f"{prefix}post_attention_layernorm.weight"] = (h,)
        shapes |= {"model.norm.weight": (h,), "lm_head.weight": (words, h)}
        if projector:
            shapes |= {"model.mm_projector.weight": (h, 1024), "model.mm_projector.bias": (h,)}
        return {name: TensorInfo(shape, torch.float16) for name, shape in shapes.items()}


FULL = Shape("llama-7b", 4096, 11008, 32)
SCALED = (
    Shape("llama-7b, 2 layers", 4096, 11008, 2),
    Shape("llama-7b, 8 layers", 4096, 11008, 8),
    Shape("llama-13b, 4 layers", 5120, 13824, 4),
)


def show(what: str, **facts: object) -> None:
    """Prints a measurement."""
    print(json.dumps({"what": what, **facts}), flush=True)


def make_checkpoint(folder: Path, shape: Shape, *, delta: bool) -> int:
    """Writes a checkpoint with random numbers; returns the bytes of its tensors."""
    folder.mkdir()
    tensors = shape.tensors(DELTA_WORDS if delta else BASE_WORDS, projector=delta)
    generator = torch.Generator().manual_seed(int(delta))
    pool = (torch.randn(POOL, generator=generator) * (0.002 if delta else 0.02)).half()
    shards = plan_shards(tensors, sum(info.nbytes for info in tensors.values()) // 3 + 1)
    for file, names in shards.filename_to_tensors.items():
        infos = {name: tensors[name] for name in names}
        with SafetensorsWriter(folder / file, infos) as writer:
            for name in writer.order:
                shift = 1.0 if "norm" in name and not delta else 0.0
                for start in range(0, infos[name].numel, POOL):
                    piece = pool[: min(POOL, infos[name].numel - start)]
                    writer.append((piece + shift).half() if shift else piece)
    (folder / "model.safetensors.index.json").write_text(index_of(shards))
    heads = shape.hidden // 128
    config = {"hidden_size": shape.hidden, "num_attention_heads": heads, "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    return sum(info.nbytes for info in tensors.values())


def drop_from_cache(folder: Path) -> None:
    """Asks the kernel to forget a folder's files, so that the next reader goes to the disk."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def run(*words: str) -> tuple[float, float, int]:
    """Runs a command; returns its seconds, those of the processor, its peak memory in bytes."""
    start = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def measure(root: Path, shape: Shape) -> None:
    """Makes base and delta of a shape, adds them, and copies the sum."""
    base, delta, target, copy = (root / name for name in ("base", "delta", "target", "copy"))
    make_checkpoint(base, shape, delta=False)
    size = make_checkpoint(delta, shape, delta=True)
    for folder in (base, delta):
        drop_from_cache(folder)
    words = ["apply-delta", "--base", str(base), "--delta", str(delta), "--target", str(target)]
    seconds, cpu, peak = run(sys.executable, "-m", "chatbind_cli", *words)
    for folder in (base, delta):
        shutil.rmtree(folder)
    drop_from_cache(target)
    copied, copied_cpu, _ = run("cp", "-r", str(target), str(copy))
    synced, _, _ = run("sync")
    shutil.rmtree(target)
    shutil.rmtree(copy)
    show(
        "apply-delta",
        shape=shape.name,
        gb=round(size / 1e9, 2),
        seconds=round(seconds, 1),
        cpu_seconds=round(cpu, 1),
        peak_rss_mib=peak >> 20,
        cp_seconds=round(copied, 1),
        cp_cpu_seconds=round(copied_cpu, 1),
        cp_and_sync_seconds=round(copied + synced, 1),
        times_cp=round(seconds / copied, 2),
        times_cp_and_sync=round(seconds / (copied + synced), 2),
        load=round(os.getloadavg()[0], 1),
    )


def main() -> None:
    """Runs the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["scaled", "full"])
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for shape in SCALED if options.only != "full" else ():
            measure(Path(folder), shape)
        free = shutil.disk_usage(folder).free
        if options.only == "scaled":
            return
        if free < FULL_RUN_WANTS_BYTES:
            reason = f"{free / 1e9:.0f} GB of disk free, {FULL_RUN_WANTS_BYTES / 1e9:.0f} wanted"
            show("apply-delta", shape=FULL.name, skipped=reason)
            return
        measure(Path(folder), FULL)


if __name__ == "__main__":
    main()

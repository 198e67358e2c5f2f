"""How fast questions are answered: one by one, in fixed batches, and as `vqa` and `ask` do it.

    python benchmarks/answer.py                       # 134M parameters on the CPU, float32
    python benchmarks/answer.py --vllm ~/vllm-venv    # and a real vLLM there, by --engine
    python benchmarks/answer.py --preset 7b           # one GPU; the weights are random

200 questions about a picture, each with an answer of a fixed length, so that every way does the
same work: the lengths of the 90 answers of LLaVA's evaluation (text-only GPT-4's). No token that
ends an answer ever comes. Each way runs in a process of its own, and prints a line: answers and
tokens a second, seconds to the first token (where the way tells) and to the first answer, the
highest memory, `times`: how many times as fast, by tokens a second, as `batches of 16`, which is
what `vqa` did before; and `same`: how many of its answers are those of `batches of 16`, which all
are to be in float32. `one by one` and a few others answer a share of the questions, evenly drawn.
`chat` is a dialogue of nine turns: seconds to the first token of each, and of the last one when
nothing is kept of those before. The last line holds the ratios that are wanted.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from answering.ways import WAYS
from answering.world import PRESETS, World, make_world

ROOT = Path(__file__).parent.parent
BASE = "batches of 16"
_PATIENCE_S = 300


def measure(arguments: argparse.Namespace) -> None:
    """One way, in this process; its figures go to stdout, its answers into the folder."""
    way, every = WAYS[arguments.way]
    if len(json.loads((arguments.folder / "questions.json").read_text())) < 5 * every:
        every = 1
    world = World(arguments.folder, arguments.dtype, every, arguments.url)
    way(world)
    seconds = world.since()
    found: dict[str, Any] = {"way": arguments.way, "dtype": arguments.dtype}
    if world.turns:
        found["first_token_s"] = [round(turn, 3) for turn in world.turns]
        found |= {"nothing_kept_s": round(world.again, 3), "context": world.context}
    else:
        found |= {"questions": len(world.answers), "seconds": round(seconds, 1)}
        found["answers_per_s"] = float(f"{len(world.answers) / seconds:.4g}")
        found["tokens_per_s"] = float(f"{world.tokens / seconds:.4g}")
        for name in ("first_token", "first_answer"):
            if (value := getattr(world, name)) is not None:
                found[f"{name}_s"] = round(value, 3)
    if torch.cuda.is_available():
        found["gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    # `getrusage` would begin with what the process that started this one had
    status = dict(s.split(":", 1) for s in Path("/proc/self/status").read_text().splitlines())
    found["rss_gib"] = round(int(status["VmHWM"].split()[0]) / 2**20, 2)
    (arguments.folder / "answers.json").write_text(json.dumps(world.answers))
    print(json.dumps(found), flush=True)


def child(folder: Path, way: str, dtype: str, url: str | None = None) -> dict[str, Any]:
    """Runs a way in a process of its own."""
    words = [sys.executable, __file__, "--folder", str(folder), "--way", way, "--dtype", dtype]
    done = subprocess.run(
        [*words, *(["--url", url] if url else [])],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CHATBIND_QUIET": "1"},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def vllm(venv: Path, folder: Path, dtype: str) -> Iterator[str]:
    """A real vLLM that serves the model, sixteen answers at a time; yields its address."""
    convert = [sys.executable, "-m", "chatbind_cli", "convert", str(folder / "model")]
    subprocess.run(
        [*convert, "--language-model", str(folder / "lm")],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [str(venv / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"]
    line += ["--model", str(folder / "lm"), "--served-model-name", "lm", "--dtype", dtype]
    line += ["--enable-prompt-embeds", "--host", "127.0.0.1", "--port", str(port)]
    line += ["--max-num-seqs", "16"]
    line += [] if torch.cuda.is_available() else ["--enforce-eager"]
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "vllm.log").open("wb") as log:
        server = subprocess.Popen(
            line, env={**os.environ, **own}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        url, until = f"http://127.0.0.1:{port}/v1", time.monotonic() + _PATIENCE_S
        while time.monotonic() < until:
            if server.poll() is not None:
                raise SystemExit((folder / "vllm.log").read_text()[-3000:])
            with suppress(OSError), urllib.request.urlopen(f"{url}/models"):
                break
            time.sleep(1)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def compare(folder: Path, arguments: argparse.Namespace) -> None:
    """Runs the ways one after the other, and prints what each gives, and the ratios."""
    preset = PRESETS[arguments.preset]
    base: dict[str, str] = {}
    found: dict[str, dict[str, Any]] = {}

    def take(way: str, dtype: str, url: str | None = None) -> None:
        figures = child(folder, way, dtype, url)
        answers = json.loads((folder / "answers.json").read_text())
        if way == BASE and not base:
            base.update(answers)
        told = [n for n, text in answers.items() if n in base and text]
        if told:
            same = sum(answers[n] == base[n] for n in told)
            figures["same"] = f"{same} of {len(told)}"
        if BASE in found and "tokens_per_s" in figures:
            figures["times"] = round(figures["tokens_per_s"] / found[BASE]["tokens_per_s"], 2)
        found[way if dtype == preset["dtype"] else f"{way}, {dtype}"] = figures
        show(arguments.preset, figures)

    own = preset["dtype"]
    for way in arguments.ways or preset["ways"]:
        take(way, own)
    if preset["half"] and not arguments.ways:
        take("rows 16", preset["half"])
    if arguments.vllm is not None:
        with vllm(arguments.vllm, folder, own) as url:
            for way in ("engine, its own prompts", "engine"):
                take(way, own, url)
    show(arguments.preset, ratios(found))


def show(preset: str, figures: dict[str, Any]) -> None:
    """Prints a line."""
    print(json.dumps({"benchmark": "answer", "preset": preset, **figures}), flush=True)


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What is wanted, as far as it was measured."""

    def times(way: str, than: str) -> float | None:
        if way not in found or than not in found:
            return None
        return round(found[way]["tokens_per_s"] / found[than]["tokens_per_s"], 3)

    wanted = {
        "rows_16_than_batches_of_16": times("rows 16", BASE),
        "rows_16_than_one_by_one": times("rows 16", "one by one"),
        "engine_than_its_own_prompts": times("engine", "engine, its own prompts"),
    }
    if "chat" in found:
        turns = found["chat"]["first_token_s"]
        wanted["turn_9_than_turn_1"] = round(turns[-1] / turns[0], 3)
    return {name: value for name, value in wanted.items() if value is not None}


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    here = [way for way in WAYS if not way.startswith("engine")]
    parser.add_argument("--ways", nargs="+", choices=here, help="default: those of the preset")
    parser.add_argument("--questions", type=int, help="default: those of the preset")
    parser.add_argument("--vllm", type=Path, metavar="VENV", help="an environment that has vLLM")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        measure(arguments)
        return
    preset = PRESETS[arguments.preset]
    with tempfile.TemporaryDirectory(prefix="chatbind-answer-") as name:
        make_world(Path(name), preset, arguments.questions or preset["questions"])
        compare(Path(name), arguments)


if __name__ == "__main__":
    main()

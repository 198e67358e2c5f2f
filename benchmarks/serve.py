"""How `chatbind serve` bears a crowd, and whether everybody gets their own answer.

    make demo && python benchmarks/serve.py             # 50 clients for a minute, on the toy model

`vqa` answers the questions first: its answers are the right ones, and its tokens a second what the
server's are measured by, with batches of the same size, once it has seen all media. Then the real
server, in a process of its own, is asked each question once, and after that by all: most clients
use OpenAI's own, one question after the other, mostly in pieces; of twenty, two send broken
requests, one is slow to send or to read, and two vanish before the end. Prints a line for each
figure; exit 1 if an answer was lost or another's, a broken request was not refused, the
server's memory grew, or something was left under way when all had gone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from serving.crowd import MODALITIES, Asked, crowd, each_once

ROOT = Path(__file__).parent.parent
_REPEATED = 4
_FLAT = 1.1  # times the memory after a fifth of the time
_CHATBIND = [sys.executable, "-m", "chatbind_cli"]
_ENVIRONMENT = {
    **os.environ,
    "CHATBIND_QUIET": "1",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
}


def show(figure: str, **values: Any) -> None:
    """Prints a line."""
    print(json.dumps({"benchmark": "serve", "figure": figure, **values}), flush=True)


def cpu_seconds(pid: int) -> float:
    """What a process has taken of processors."""
    return sum(psutil.Process(pid).cpu_times()[:2])


@dataclass(frozen=True)
class Speed:
    """Tokens that were made, and what that took."""

    tokens: int
    seconds: float
    cpu_seconds: float

    def show(self, figure: str, base: Speed | None = None) -> None:
        """Prints a line; on a busy machine, what counts is a second of a processor."""
        rates = [self.tokens / self.seconds, self.tokens / self.cpu_seconds]
        values = {"tokens_per_s": round(rates[0]), "tokens_per_cpu_s": round(rates[1])}
        if base is not None:
            values |= {"of_vqa": round(rates[0] / base.tokens * base.seconds, 2)}
            values |= {"of_vqa_per_cpu": round(rates[1] / base.tokens * base.cpu_seconds, 2)}
        show(figure, **values)


def by_vqa(demo: Path, each: int, batch_size: int, tokens: int) -> tuple[list[Asked], Speed]:
    """Questions of each modality with the answers of `vqa`; and how fast they came."""
    records = []
    for modality in MODALITIES:
        path = demo / "toy" / "eval" / f"questions-{modality}.jsonl"
        records += [json.loads(line) for line in path.read_text().splitlines()[:each]]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for number in range(_REPEATED * len(records)):
            file.write(json.dumps({**records[number % len(records)], "question_id": number}) + "\n")
        file.flush()
        line = ["vqa", "-m", demo / "model", "-q", file.name]
        line += ["--media-root", demo / "toy" / "media"]
        line += ["--batch-size", batch_size, "--max-new-tokens", tokens]
        with subprocess.Popen(
            [*_CHATBIND, *map(str, line)], stdout=subprocess.PIPE, env=_ENVIRONMENT
        ) as vqa:
            assert vqa.stdout is not None
            answers: list[dict[str, Any]] = []
            for written in vqa.stdout:
                answers.append(json.loads(written))
                if len(answers) == len(records):  # from here on no medium is new
                    begun, taken = time.monotonic(), cpu_seconds(vqa.pid)
                elif len(answers) == _REPEATED * len(records):
                    seconds, taken = time.monotonic() - begun, cpu_seconds(vqa.pid) - taken
    made = sum(answer["metadata"]["n_tokens"] for answer in answers[len(records) :])
    asked = [
        Asked(record["text"], modality, record[modality], answer["text"])
        for record, answer in zip(records, answers, strict=False)
        for modality in MODALITIES
        if modality in record
    ]
    return asked, Speed(made, seconds, taken)


@contextmanager
def server(demo: Path, batch_size: int, tokens: int) -> Iterator[tuple[str, int]]:
    """A server in a process of its own: its address and process."""
    line = ["serve", "-m", demo / "model", "--media-root", demo / "toy" / "media", "--port", 0]
    line += ["--batch-size", batch_size, "--max-new-tokens", tokens]
    with subprocess.Popen(
        [*_CHATBIND, *map(str, line)], stdout=subprocess.PIPE, env=_ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        try:
            url = json.loads(process.stdout.readline())["serving"].removesuffix("/v1")
            yield url, process.pid
        finally:
            begun = time.monotonic()
            process.send_signal(signal.SIGTERM)
            code = process.wait()
            show("end", exit_code=code, seconds=round(time.monotonic() - begun, 2))


class Memory(threading.Thread):
    """Notes the memory of a process, MiB, every second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process(pid)
        self.mib: list[int] = []

    def run(self) -> None:
        """Until the process ends."""
        with suppress(psutil.Error):
            while mib := self._process.memory_info().rss >> 20:
                self.mib.append(mib)
                time.sleep(1)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """The median, and what one in a hundred exceeds."""
    ordered = sorted(seconds)
    return {f"p{p}_s": round(ordered[len(ordered) * p // 100], 3) for p in (50, 99)}


def idle(url: str, patience_s: float = 10.0) -> float | None:
    """Seconds until the server has nothing under way; None: it never comes to that."""
    begun = time.monotonic()
    while time.monotonic() < begun + patience_s:
        with urllib.request.urlopen(f"{url}/health") as reply:
            health = json.load(reply)
        if not health["waiting"] + health["under_way"]:
            return round(time.monotonic() - begun, 2)
        time.sleep(0.05)
    return None


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="what `make demo` has made")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--questions", type=int, default=50, help="of each modality")
    chosen = parser.parse_args()
    how = (chosen.batch_size, chosen.max_new_tokens)
    questions, alone = by_vqa(chosen.demo, chosen.questions, *how)
    alone.show("vqa")
    with server(chosen.demo, *how) as (url, pid):
        memory = Memory(pid)
        memory.start()
        begun = time.monotonic()
        first = asyncio.run(each_once(url, questions))
        show("each once", questions=first.answers, seconds=round(time.monotonic() - begun, 1))
        begun, taken = time.monotonic(), cpu_seconds(pid)
        tally = asyncio.run(crowd(url, questions, chosen.clients, chosen.seconds))
        seconds, taken = time.monotonic() - begun, cpu_seconds(pid) - taken
        left = idle(url)
    show("crowd", clients=chosen.clients, seconds=round(seconds, 1), **dict(tally.troubles))
    tally.wrong += first.wrong
    show("answers", answers=tally.answers, wrong_or_lost=len(tally.wrong), examples=tally.wrong[:5])
    show("first token", **percentiles(tally.first_s))
    show("whole answer", **percentiles(tally.whole_s))
    Speed(tally.tokens, seconds, taken).show("tokens", alone)
    early, late = memory.mib[len(memory.mib) // 5], memory.mib[-1]
    show("memory", mib=memory.mib[:: max(1, len(memory.mib) // 10)], highest=max(memory.mib))
    show("idle when all have gone", after_s=left)
    sys.exit(bool(tally.wrong) or left is None or late > _FLAT * early)


if __name__ == "__main__":
    main()

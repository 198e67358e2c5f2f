"""Measures a review: judgements a second against the server's own latency, memory, the report.

    python benchmarks/review.py [--judgements 2000] [--long 10000] [--concurrency 32]
                                [--latency 0.5] [--reviews 5000] [--only throughput,memory,report]

Prints one JSON object a line. The server runs in a process of its own on this machine and answers
every request after a fixed time, so the ideal is concurrency / latency judgements a second. The
report is opened in headless Chromium if that is here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from chatbind_cli.evaluation.cases import Case
from chatbind_cli.evaluation.judges.chat import ChatJudge
from chatbind_cli.evaluation.judges.judge import JudgeSettings
from chatbind_cli.evaluation.judging import ReviewOptions, judgements_of, make_missing
from chatbind_cli.evaluation.report.page import render_report
from chatbind_cli.evaluation.summary import summarize
from chatbind_cli.jsonl import RecordWriter

WORDS = ["this", "answer", "is", "more", "precise", "than", "the", "other", "nobody", "can"]


def show(what: str, **figures: object) -> None:
    """Prints one figure."""
    print(json.dumps({"benchmark": "review", "what": what, **figures}), flush=True)


def serve(latency_s: float, port: Connection) -> None:
    """A chat endpoint that needs `latency_s` for every reply and hardly any computing."""
    message = {"role": "assistant", "content": "8 6\n" + " ".join(WORDS * 10)}
    body = json.dumps(
        {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": "judge",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 500, "completion_tokens": 100, "total_tokens": 600},
        }
    ).encode()
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    reply = head.encode() + body

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                asked = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(asked.split(b"content-length:")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                await asyncio.sleep(latency_s)
                writer.write(reply)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def cases(n: int) -> Iterator[Case]:
    """Questions with two answers of sixty words each."""
    draw = random.Random(0)
    for i in range(n):
        first, second = ({"text": " ".join(draw.choices(WORDS, k=60))} for _ in range(2))
        question = {"question_id": i, "text": f"What is it, {i}?", "category": "conv"}
        yield Case(question=question, answers=(first, second), models=("a", "b"))


def resident_mb() -> float:
    """Memory of this process now."""
    return psutil.Process().memory_info().rss / 1e6


def review(path: Path, port: int, n: int, concurrency: int) -> tuple[float, list[float]]:
    """Seconds for `n` judgements, and the memory after each tenth of them."""
    memory: list[float] = []
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if done % max(1, n // 10) == 0:
            memory.append(resident_mb())

    judge = ChatJudge(JudgeSettings(model="judge", url=f"http://127.0.0.1:{port}/v1"))
    start = time.perf_counter()
    with RecordWriter(path, key="review_id") as writer:
        options = ReviewOptions(orders="as-given", concurrency=concurrency)
        judgements = judgements_of(cases(n), judge, options)
        outcome = make_missing(judgements, judge, writer, options, on_done=count)
    seconds = time.perf_counter() - start
    assert outcome.judged == n
    return seconds, memory


def throughput(folder: Path, port: int, arguments: argparse.Namespace) -> None:
    """Judgements a second against the ideal."""
    n, concurrency = arguments.judgements, arguments.concurrency
    review(folder / "warm.jsonl", port, concurrency, concurrency)
    start = time.process_time()
    seconds, _ = review(folder / "t.jsonl", port, n, concurrency)
    ideal = concurrency / arguments.latency
    show(
        "throughput",
        judgements=n,
        concurrency=concurrency,
        latency_s=arguments.latency,
        per_second=round(n / seconds, 1),
        ideal_per_second=ideal,
        share_of_ideal=round(n / seconds / ideal, 3),
        cpu_ms_each=round(1000 * (time.process_time() - start) / n, 2),
    )


def memory(folder: Path, port: int, arguments: argparse.Namespace) -> None:
    """Memory after each tenth of a long run."""
    _, after = review(folder / "m.jsonl", port, arguments.long, 2 * arguments.concurrency)
    show(
        "memory",
        judgements=arguments.long,
        mb_after_each_tenth=[round(value, 1) for value in after],
        growth_mb_after_the_first_tenth=round(after[-1] - after[0], 1),
        bytes_each=round((after[-1] - after[0]) * 1e6 / (0.9 * arguments.long)),
    )
    before = resident_mb()
    start = time.perf_counter()
    with (folder / "m.jsonl").open() as file:
        (found,) = summarize(map(json.loads, file))
    show(
        "summarize",
        reviews=found.total["n"],
        seconds=round(time.perf_counter() - start, 2),
        grown_mb=round(resident_mb() - before, 1),
        peak_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    )


def report(folder: Path, n: int) -> None:
    """Seconds to write the report of `n` reviews and to open it in a browser."""
    draw = random.Random(1)
    reviews = []
    for i in range(n):
        metadata = {"order": [[1, 2], [2, 1]][i % 2], "slot": str(i), "models": ["a", "b"]}
        record = {"question_id": i // 2, "category": "conv", "reviewer_id": "judge"}
        scores = [draw.randint(5, 9), draw.randint(4, 10)]
        words = " ".join(draw.choices(WORDS, k=100))
        reviews.append({**record, "tuple": scores, "content": words, "metadata": metadata})
    answers = {str(i): {"text": " ".join(draw.choices(WORDS, k=60))} for i in range(n)}
    path = folder / "report.html"
    start = time.perf_counter()
    summaries = summarize(reviews, with_words=True)
    figures_s = time.perf_counter() - start
    with path.open("w") as file:
        file.writelines(render_report(summaries, questions=answers, answers=[answers, answers]))
    show(
        "report written",
        reviews=n,
        figures_s=round(figures_s, 2),
        page_s=round(time.perf_counter() - start - figures_s, 2),
        megabytes=round(path.stat().st_size / 1e6, 1),
    )
    opened = open_in_browser(path, folder)
    if opened is not None:
        show("report opened", reviews=n, **opened)


def open_in_browser(path: Path, folder: Path) -> dict[str, Any] | None:
    """How long Chromium takes; None where there is none."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        return None
    from selenium import webdriver  # noqa: PLC0415  not everybody has it

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-dev-shm-usage"):
        options.add_argument(f"--{word}")
    for word in ("background-networking", "component-update", "sync"):
        options.add_argument(f"--disable-{word}")
    options.add_argument(f"--user-data-dir={folder / 'profile'}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    painted = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))"
    scroll = """
const done = arguments[0], height = document.documentElement.scrollHeight, times = [];
let last = performance.now(), step = 0;
const go = () => {
  const now = performance.now(); times.push(now - last); last = now;
  window.scrollTo(0, height * step / 60);
  if (++step <= 60) requestAnimationFrame(go); else done(times.slice(1));
};
requestAnimationFrame(go);"""
    try:
        times = []
        for _ in range(3):
            browser.get("about:blank")
            start = time.perf_counter()
            browser.get(path.as_uri())
            browser.execute_async_script(painted)
            times.append(time.perf_counter() - start)
        frames = browser.execute_async_script(scroll)
    finally:
        browser.quit()
    return {
        "seconds_median_of_3": round(statistics.median(times), 2),
        "scroll_frame_ms_median": round(statistics.median(frames), 1),
        "scroll_frame_ms_longest": round(max(frames), 1),
    }


def main() -> None:
    """Runs the measurements that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--judgements", type=int, default=2000)
    parser.add_argument("--long", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--latency", type=float, default=0.5)
    parser.add_argument("--reviews", type=int, default=5000)
    parser.add_argument("--only", default="throughput,memory,report")
    arguments = parser.parse_args()
    wanted = set(arguments.only.split(","))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for what, latency in (("throughput", arguments.latency), ("memory", 0.02)):
            if what not in wanted:
                continue
            here, there = multiprocessing.Pipe()
            server = multiprocessing.Process(target=serve, args=(latency, there), daemon=True)
            server.start()
            {"throughput": throughput, "memory": memory}[what](folder, here.recv(), arguments)
            server.terminate()
            server.join()
        if "report" in wanted:
            report(folder, arguments.reviews)


if __name__ == "__main__":
    main()

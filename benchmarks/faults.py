"""The fault table: `download` (with unpacking) and `apply-delta`, killed at random and run again.

    python benchmarks/faults.py [--kills 20] [--seed 0] [--only apply-delta]

Each round starts the program in a fresh folder, kills it with SIGKILL at a random moment between
the beginning of its work and its end, runs the same command again, and compares every file that
it leaves with those of an undisturbed run. Prints one JSON object a round and one a table; exit 1
unless every round ended in the same bytes. The server listens on 127.0.0.1 alone.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from delta import Shape, make_checkpoint, show

MEMBERS, MEMBER_BYTES = 3000, 8192
SERVED_BLOCK, SERVED_PAUSE_S = 256 << 10, 0.01
SMALL = Shape("small", 512, 1376, 12)


def archive(generator: random.Random) -> bytes:
    """A zip of many small files with random bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for number in range(MEMBERS):
            name = f"{number % 30:02d}/{number:05d}.bin"
            zipped.writestr(name, generator.randbytes(MEMBER_BYTES))
    return buffer.getvalue()


class _Handler(BaseHTTPRequestHandler):
    """Serves one file slowly, with ranges and an ETag."""

    protocol_version = "HTTP/1.1"
    data = b""

    def log_message(self, *words: object) -> None:
        pass

    def do_GET(self) -> None:
        begin = 0
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes=") and self.headers.get("If-Range", '"v1"') == '"v1"':
            begin = int(wanted[6:].split("-")[0])
        self.send_response(206 if begin else 200)
        if begin:
            size = len(self.data)
            self.send_header("Content-Range", f"bytes {begin}-{size - 1}/{size}")
        self.send_header("ETag", '"v1"')
        self.send_header("Content-Length", str(len(self.data) - begin))
        self.end_headers()
        for at in range(begin, len(self.data), SERVED_BLOCK):
            try:
                self.wfile.write(self.data[at : at + SERVED_BLOCK])
            except OSError:
                self.close_connection = True
                return
            time.sleep(SERVED_PAUSE_S)


@contextmanager
def served(data: bytes) -> Iterator[str]:
    """The address at which `data` is served."""
    handler = type("Handler", (_Handler,), {"data": data})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/i.zip"
        server.shutdown()


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder, and its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def start(words: list[str], begun: Path) -> subprocess.Popen[bytes]:
    """Starts a program and waits until its work has begun: until a path is there."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not begun.exists() and process.poll() is None:
        time.sleep(0.002)
    return process


def finish(process: subprocess.Popen[bytes]) -> None:
    """Waits for a program that must succeed."""
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(errors.decode())


def table(
    what: str,
    kills: int,
    generator: random.Random,
    command: Callable[[Path], list[str]],
    begun: Callable[[Path], Path],
    root: Path,
) -> bool:
    """Kills and resumes one program; returns whether every round ended in the same bytes."""
    calm = root / "calm"
    calm.mkdir()
    process = start(command(calm), begun(calm))
    began = time.monotonic()
    finish(process)
    lasts = time.monotonic() - began
    wanted = content(calm)
    same = rounds = 0
    while rounds < kills:
        folder = root / "killed"
        folder.mkdir()
        moment = generator.uniform(0, lasts)
        process = start(command(folder), begun(folder))
        time.sleep(moment)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        if process.returncode == -signal.SIGKILL:  # else it was through before the kill
            rounds += 1
            left = len(content(folder))
            finish(start(command(folder), folder))
            identical = content(folder) == wanted
            same += identical
            show(what, killed_after_s=round(moment, 3), files_left=left, identical=identical)
        shutil.rmtree(folder)
    shutil.rmtree(calm)
    show(f"{what}: table", work_s=round(lasts, 2), kills=kills, resumed_to_identical=same)
    return same == kills


def main() -> None:
    """Runs both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", choices=["download", "apply-delta"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one by default")
    options = parser.parse_args()
    generator = random.Random(options.seed)
    data = archive(generator)
    good = True
    chosen = [options.only] if options.only else ["download", "apply-delta"]
    with tempfile.TemporaryDirectory(dir=options.folder) as name, served(data) as url:
        root = Path(name)
        if "download" in chosen:
            fetch = ["-m", "chatbind_cli", "--quiet", "download", url, "--unpack", "--output"]
            good &= table(
                "download",
                options.kills,
                generator,
                lambda folder: [sys.executable, *fetch, str(folder / "x")],
                lambda folder: folder / "x",
                root,
            )
        if "apply-delta" in chosen:
            base, delta = root / "base", root / "delta"
            make_checkpoint(base, SMALL, delta=False)
            make_checkpoint(delta, SMALL, delta=True)
            words = ["-m", "chatbind_cli", "--quiet", "apply-delta", "--shard-size", "0.004"]
            words += ["--base", str(base), "--delta", str(delta), "--target"]
            good &= table(
                "apply-delta",
                options.kills,
                generator,
                lambda folder: [sys.executable, *words, str(folder / "t")],
                lambda folder: folder / ".t.partial",
                root,
            )
    sys.exit(not good)


if __name__ == "__main__":
    main()

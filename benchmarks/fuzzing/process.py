"""Runs the program and watches it; keeps what was found."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

# imported here so that the forks have it
import torch
import torchaudio  # noqa: F401
import transformers  # noqa: F401

import chatbind_cli.encoders.imagebind.encoder
import chatbind_cli.encoders.imagebind.preprocess
import chatbind_cli.model.assemble  # noqa: F401
from chatbind_cli.cli import main as program

MOST_MIB, MOST_SECONDS = 2048, 30.0
_ADDRESS_SPACE = 12 << 30
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG: no process outlives a campaign that is killed
_SHOWN = 600  # characters of stderr in a finding


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    seconds: float
    peak_mib: float
    killed: str
    stdout: bytes
    stderr: str


@dataclass
class Result:
    """What a job found, and what it cost."""

    runs: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: list[dict[str, Any]] = field(default_factory=list)
    slowest: dict[str, tuple[float, str]] = field(default_factory=dict)
    largest: dict[str, tuple[float, str]] = field(default_factory=dict)

    def cost(self, kind: str, name: str, ended: Ended) -> None:
        """Keeps the slowest and the largest run of a format."""
        self.slowest[kind] = max(self.slowest.get(kind, (0.0, "")), (ended.seconds, name))
        self.largest[kind] = max(self.largest.get(kind, (0.0, "")), (ended.peak_mib, name))

    def find(self, name: str, words: Sequence[str], ended: Ended, problem: str) -> None:
        """Keeps and prints a finding."""
        finding = {
            "name": name, "command": " ".join(words)[:300], "exit": ended.code,
            "seconds": round(ended.seconds, 2), "peak_mib": round(ended.peak_mib),
            "problem": problem, "stderr": ended.stderr[-_SHOWN:],
        }  # fmt: skip
        self.runs[kind_of(name), "findings"] += 1
        self.findings.append(finding)
        os.write(sys.__stdout__.fileno(), (json.dumps(finding) + "\n").encode())  # type: ignore[union-attr]


@dataclass(frozen=True)
class Campaign:
    """Where everything lies, and how patient one is."""

    seed: int
    home: Path
    patience: float
    keep: Path | None

    @property
    def models(self) -> Path:
        """The encoder, models and weights that are not mutated."""
        return self.home / "models"

    def link_models(self, folder: Path) -> None:
        """Makes them all be there in a folder, too."""
        for path in self.models.iterdir():
            (folder / path.name).symlink_to(path)

    def write(self, path: Path, name: str, data: bytes) -> None:
        """Writes a mutant where it is read, and where mutants are kept."""
        path.write_bytes(data)
        if self.keep:
            self.keep.mkdir(parents=True, exist_ok=True)
            (self.keep / name).write_bytes(data)


def kind_of(name: str) -> str:
    """The format in a mutant's name."""
    return name.rpartition("-")[0]


def is_good(name: str) -> bool:
    """Whether it is number 0 of its format, which is no mutant: it must not be refused."""
    return name.endswith("-0000")


def run(words: Sequence[str], folder: Path, seconds: float, *, script: bool = False) -> Ended:
    """Runs the program in a folder, watched: see the top of this file."""
    begun, watched = time.monotonic(), 0.0
    paths = {name: folder / f".{name}" for name in ("stdin", "stdout", "stderr")}
    paths["stdin"].write_text("y\n" * 20)
    child = os.fork()
    if not child:
        _become(words, folder, paths, script)
    killed = ""
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        watched = max(watched, _resident_mib(child))
        if watched > MOST_MIB:
            killed = f"holds more than {MOST_MIB} MiB"
        elif time.monotonic() - begun > seconds:
            killed = f"takes more than {seconds:.0f} s"
        if killed:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
        time.sleep(0.02)
    return Ended(
        code=os.waitstatus_to_exitcode(status),
        seconds=time.monotonic() - begun,
        peak_mib=max(watched, usage.ru_maxrss / 1024),
        killed=killed,
        stdout=paths["stdout"].read_bytes(),
        stderr=paths["stderr"].read_text(errors="replace"),
    )


def _become(words: Sequence[str], folder: Path, paths: dict[str, Path], script: bool) -> None:
    """The child: streams, limits, then the program; never returns."""
    code = 70
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number, name in enumerate(paths):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(paths[name], flags, 0o600), number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # a fork's first call makes a new thread pool, which two threads at once find half made
        torch.set_num_threads(1)
        if script:
            os.execv(Path(sys.executable).with_name("chatbind"), ["chatbind", *words])
        sys.argv = ["chatbind", *words]
        sys.stdin = os.fdopen(0, "r", encoding="utf-8")
        sys.stdout = os.fdopen(1, "w", encoding="utf-8")
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1)
        try:
            program(list(words))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        sys.stdout.flush()
    except BaseException as error:
        os.write(2, f"Traceback: {type(error).__name__}: {error}\n".encode(errors="replace"))
    finally:
        os._exit(code)


def _resident_mib(child: int) -> float:
    try:
        return psutil.Process(child).memory_info().rss / 2**20
    except psutil.Error:
        return 0.0


def ill(ended: Ended, codes: Sequence[int]) -> str:
    """What is wrong with an end, whatever was run; nothing if it is well."""
    if ended.killed:
        return ended.killed
    if ended.code < 0:
        return f"died by {signal.Signals(-ended.code).name}"
    for sign in ("Traceback", "internal error"):
        if sign in ended.stderr:
            return sign
    if ended.peak_mib > MOST_MIB:
        return f"holds more than {MOST_MIB} MiB"
    if ended.code not in codes:
        return f"exit {ended.code}"
    if (
        ended.code == 1
        and sum(s.startswith("chatbind: error:") for s in ended.stderr.splitlines()) != 1
    ):
        return "exit 1 without one line of error"
    return ""


def stray(ended: Ended) -> str:
    """A line on stderr that a library wrote."""
    strange = [s for s in ended.stderr.splitlines() if s.strip() and not s.startswith("chatbind: ")]
    return (
        f"not a line of ours on stderr: {strange[0][:160]}" if strange and ended.code != 2 else ""
    )


def write_lines(path: Path, records: Iterable[Any]) -> None:
    """Writes a JSON value a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def strict(line: bytes) -> Any:
    """A JSON value; NaN and Infinity are none."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return json.loads(line, parse_constant=refuse)

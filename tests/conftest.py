"""Shared fixtures: where the golden and public data lie, and a home that is not the user's."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path

import pytest

import chatbind_cli

ROOT = Path(__file__).resolve().parent.parent

# Tiny models run fastest on one thread, and the suite runs in as many processes as there are
# cores. Children inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts background jobs with Ctrl-C ignored, and children inherit that; the programs that
# tests interrupt are to be as a terminal starts them.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The suite also runs from a checkout that is not installed editably: `commands/` is mapped to
# `chatbind_cli.commands` by the installer, and this line does the same for a bare checkout.
if importlib.util.find_spec("chatbind_cli.commands") is None:
    chatbind_cli.__path__.append(str(ROOT))


def _shared(name: str) -> Path:
    folder = ROOT.parent / "shared" / name
    if not folder.is_dir():
        pytest.skip(f"needs the folder ../shared/{name}, which is not part of the project")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """Numbers computed with the reference implementations."""
    return _shared("golden")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public files as they were published."""
    return _shared("data")


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's caches, tokens or settings."""
    home = tmp_path_factory.getbasetemp() / "home"
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "CHATBIND_DEBUG", "SLURM_NNODES", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)

"""A copy of a folder in which `chatbind toy . --quick` alone was run.

The models are hardly trained: these tests are about the commands, not about their answers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.warm import CLIENT

Shell = Callable[..., "subprocess.CompletedProcess[str]"]


def environment(home: Path) -> dict[str, str]:
    """The user's environment with a home of its own and `chatbind` on the path."""
    folder = home / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "chatbind"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m chatbind_cli "$@"\n')
    program.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(home / "cache"),
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        # lines stand in these tests as they are printed; so what makes them quick stands here
        "CHATBIND_TOY_QUICK": "1",
        "CHATBIND_VQA_MAX_NEW_TOKENS": "8",
        "CHATBIND_PRETRAIN_MAX_STEPS": "2",
        "CHATBIND_FINETUNE_MAX_STEPS": "2",
    }


@pytest.fixture(scope="session")
def made(
    quick_world: tuple[Path, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    """The folder and the environment; read only: tests work in a copy."""
    return quick_world[0], environment(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def warm(
    made: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """The environment, with a `chatbind` on the path that need not load its libraries."""
    _, env = made
    folder = tmp_path_factory.mktemp("warm")
    path = str(folder / "socket")
    program = folder / "chatbind"
    program.write_text(CLIENT.format(python=sys.executable, path=path))
    program.chmod(0o755)
    root = Path(__file__).parents[2]
    server = subprocess.Popen(
        [sys.executable, root / "tests/e2e/warm.py", path],
        env={**env, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    yield {**env, "PATH": f"{folder}:{env['PATH']}"}
    server.kill()
    server.communicate()


@pytest.fixture
def shell(made: tuple[Path, dict[str, str]], tmp_path: Path) -> Shell:
    """Runs a line of bash in a copy of the folder; `check=False` where it may fail."""
    source, env = made
    folder = tmp_path / "work"
    shutil.copytree(source, folder, symlinks=True)

    def run(
        line: str, *, check: bool = True, env: dict[str, str] = env
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", line],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert not check or done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done

    run.folder = folder  # type: ignore[attr-defined]
    return run

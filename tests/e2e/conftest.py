"""A folder with a toy world and everything that the demo makes of it, in a few seconds.

The models are hardly trained: these tests are about the commands, not about their answers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = [sys.executable, "-m", "chatbind_cli"]
TRAINING = "-m toy/llama --encoder toy/imagebind --media-root toy/media --max-steps 2 "
TRAINING += "--per-device-train-batch-size 4 --gradient-accumulation-steps 1"

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
    }


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder and the environment; read only: tests work in a copy."""
    folder = tmp_path_factory.mktemp("world")
    env = environment(tmp_path_factory.mktemp("home"))
    lines = [
        "chatbind toy toy --quick",
        f"chatbind pretrain {TRAINING} --data toy/train/captions.json -o ckpt/pretrain",
        "chatbind extract-projector ckpt/pretrain -o projector.safetensors",
        f"chatbind finetune {TRAINING} --data toy/train/instructions.json "
        "--projector projector.safetensors -o model",
        "head -n 4 toy/eval/questions-image.jsonl > questions.jsonl",
        "head -n 4 toy/eval/answers-reference-image.jsonl > reference.jsonl",
        "chatbind vqa -m model -q questions.jsonl --media-root toy/media --max-new-tokens 32 "
        "-o answers.jsonl",
        "chatbind review --question questions.jsonl --judge rule "
        "--answer-list reference.jsonl answers.jsonl -o reviews.jsonl",
        "chatbind make-delta --base toy/llama --target model --delta delta",
    ]
    for line in lines:
        done = subprocess.run(
            ["bash", "-c", line], cwd=folder, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    return folder, env


@pytest.fixture
def shell(made: tuple[Path, dict[str, str]], tmp_path: Path) -> Shell:
    """Runs a line of bash in a copy of the folder; `check=False` where it may fail."""
    source, env = made
    folder = tmp_path / "work"
    shutil.copytree(source, folder, symlinks=True)

    def run(line: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
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

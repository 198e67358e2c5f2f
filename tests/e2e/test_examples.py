"""The examples in every command's help, the README's commands and the make targets are real."""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from chatbind_cli import cli

ROOT = Path(__file__).resolve().parent.parent.parent


# Words of examples that need a network, a key, a server, gigabytes or minutes, or the user's files:
# those lines are only parsed.
OUT_OF_REACH = (
    "imagebind_huge.pth",
    "checkpoints/",
    "OPENAI_API_KEY",
    "localhost",
    "stage1.toml",
    "toy world",
)


def examples():
    for name, (module, _) in cli.COMMANDS.items():
        command = importlib.import_module(f"chatbind_cli.commands.{module}").command
        for example in command.examples:
            yield pytest.param(example, id=f"{name}: {example[:60]}")


def reachable(example):
    return not any(word in example for word in OUT_OF_REACH) or "--dry-run" in example


def parse(line):
    """Parses a `chatbind` line without running it."""
    words = shlex.split(line)
    assert words[0].endswith("chatbind"), line
    name, *rest = words[1:]
    module = importlib.import_module(f"chatbind_cli.commands.{cli.COMMANDS[name][0]}")
    command: click.Command = module.command
    with command.make_context(name, rest, resilient_parsing=False):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("example", list(examples()))
def test_the_examples_of_help_run_as_they_stand(shell, example):
    if not reachable(example):
        pytest.skip("needs what a test cannot have: " + example)
    if "| jq" in example and shutil.which("jq") is None:
        pytest.skip("needs jq: " + example)
    done = shell(example)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_at_least_two_examples_of_each_command_are_run(name):
    module = cli.COMMANDS[name][0]
    command = importlib.import_module(f"chatbind_cli.commands.{module}").command
    assert sum(reachable(example) for example in command.examples) >= 2


def test_every_line_of_the_reproduction_parses(tmp_path, monkeypatch):
    for folder in ("data", "checkpoints"):
        assert not (ROOT / folder / ".done").exists(), "a real run has left its stamps here"
    done = subprocess.run(
        ["make", "-s", "summary", "DRY_RUN=1", "GPUS=2"],
        cwd=ROOT,
        env={**os.environ, "MAKEFLAGS": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    names = [shlex.split(line)[1] for line in lines]
    assert names == [
        "download",
        "download",
        "pretrain",
        "extract-projector",
        "finetune",
        "vqa",
        "review",
        "summarize",
    ]
    # Inputs that options check for must be there for the line to parse.
    monkeypatch.chdir(tmp_path)
    for line in lines:
        for word in shlex.split(line):
            if word.startswith(("data/", "checkpoints/")):
                path = Path(word)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch() if path.suffix else path.mkdir(exist_ok=True)
    for line in lines:
        parse(line)
    assert "--gradient-accumulation-steps 4" in lines[2]
    assert "full_shard\\ auto_wrap" in lines[4]

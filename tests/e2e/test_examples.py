"""The examples in every command's help, in the README and docs, and the make targets are real."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import urllib.request
from pathlib import Path

import click
import pytest

from chatbind_cli import cli
from tests.chat_server import JudgeServer

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def lines(kind, ends=True):
    """The lines in the commands' help, of those that end, or of the one that does not."""
    for name, lazy in cli.app.commands.items():
        command = lazy.load()
        for line in getattr(command, kind) if ends != (name == "serve") else ():
            yield pytest.param(line, id=f"{name}: {line[:60]}")


def blocks(language):
    """The documents' blocks in a language."""
    text = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def document_lines():
    """What the documents show at a prompt, and in their blocks for bash."""
    for block in blocks("console"):
        yield from re.findall(r"^\$ (.*)$", block, re.MULTILINE)
    for block in blocks("bash"):
        yield from filter(None, block.replace("\\\n", "").splitlines())


def runs_here(line):
    """Whether a line of a document needs neither make nor the published weights."""
    return not re.search(r"^make |checkpoints/|chatbind download (?!.*--dry-run)", line)


def make_inputs(words):
    """Makes whatever looks like a path: inputs that options check for must be there."""
    for path in (Path(word) for word in words if re.fullmatch(r"[\w./-]*[/.][\w.-]*", word)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch() if path.suffix else path.mkdir(exist_ok=True)


def parse(line):
    """Parses a `chatbind` line without running it."""
    words = shlex.split(line)
    assert words[0].endswith("chatbind"), line
    name, *rest = words[1:]
    command: click.Command = cli.app.commands[name].load()
    with command.make_context(name, rest, resilient_parsing=False):
        pass


@pytest.fixture(scope="module")
def world(made, warm, tmp_path_factory):
    """Runs lines of bash one after the other in one copy of the world, as a newcomer does."""
    source, _ = made
    folder = tmp_path_factory.mktemp("newcomer") / "world"
    shutil.copytree(source, folder)
    # `quick_world` was made by the line that makes this one, which so finds it done
    shutil.copytree(source, folder / "small")

    def run(line, **more):
        return subprocess.run(
            ["bash", "-o", "pipefail", "-c", line],
            cwd=folder,
            env={**warm, **more},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    run.folder = folder
    return run


@pytest.mark.slow
@pytest.mark.parametrize("line", list(lines("examples")))
def test_the_examples_of_help_run_as_they_stand(world, line):
    done = world(line)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("line", list(lines("examples", ends=False)))
def test_the_examples_of_a_server_serve(world, warm, line):
    place = {"cwd": world.folder, "env": {**warm, "CHATBIND_SERVE_PORT": "0"}}
    process = subprocess.Popen(
        ["bash", "-c", f"exec {line}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **place
    )
    try:
        where = json.loads(process.stdout.readline())["serving"]
        with urllib.request.urlopen(f"{where}/models") as reply:
            assert json.load(reply)["data"][0]["id"] == "model"
        process.terminate()
        assert process.wait(30) == 0
        assert b"Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("line", list(filter(runs_here, document_lines())))
def test_the_documents_lines_run_as_they_stand(world, line):
    done = world(line)
    # `head` may have enough before a command is through
    assert done.returncode in (0, 141) if "| head" in line else done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_readme_s_python_runs_as_it_stands(world, monkeypatch, capsys):
    (program,) = blocks("python")
    monkeypatch.chdir(world.folder)
    exec(compile(program, "README.md", "exec"), {"__name__": "__main__"})
    assert "\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        *lines("elsewhere"),
        *lines("elsewhere", ends=False),
        *(line for line in document_lines() if "chatbind " in line and not runs_here(line)),
    ],
)
def test_what_needs_the_network_or_a_key_at_least_parses(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    words = words[words.index("chatbind") :]  # what comes before are variables
    make_inputs(words)
    parse(shlex.join(words))


@pytest.mark.slow
def test_the_example_with_an_endpoint_runs_where_one_is_served(world):
    (line,) = (p.values[0] for p in lines("elsewhere") if "localhost:8000" in p.values[0])
    server = JudgeServer()
    try:
        done = world(line.replace("http://localhost:8000/v1", server.url))
    finally:
        server.close()
    assert done.returncode == 0, done.stderr


def test_the_formats_shown_are_json():
    for line in "".join(blocks("json")).splitlines():
        assert isinstance(json.loads(line), dict)


@pytest.mark.parametrize(
    ("words", "encoder"), [([], "imagebind"), (["DEMO_ENCODER=pe-av"], "pe-av")]
)
def test_the_demo_takes_an_encoder_of_the_toy_world(words, encoder):
    done = subprocess.run(
        ["make", "-n", "demo", *words],
        cwd=ROOT,
        env={**os.environ, "MAKEFLAGS": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    named = re.findall(r"--encoder (\S+)", done.stdout)
    assert named == [*[f"demo/toy/{encoder}"] * 3, f"demo/toy/{encoder}-unbound"]


def test_every_line_of_the_reproduction_parses(tmp_path, monkeypatch):
    for folder in ("data", "checkpoints"):
        assert not (ROOT / folder / ".done").exists(), "a real run has left its stamps here"
    done = subprocess.run(
        ["make", "-s", "summary", "DRY_RUN=1", "GPUS=3"],
        cwd=ROOT,
        env={**os.environ, "MAKEFLAGS": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    made = done.stdout.splitlines()
    names = [shlex.split(line)[1] for line in made]
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
    monkeypatch.chdir(tmp_path)
    make_inputs(word for line in made for word in shlex.split(line))
    for line in made:
        parse(line)
    # the published samples a step, also where they cannot be shared out evenly
    assert "--global-batch-size 128" in made[2]
    assert "--global-batch-size 32" in made[4]
    assert "full_shard\\ auto_wrap" in made[4]

"""What docs/serving.md shows is what a server does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.loaded_model import load_model
from chatbind_cli.inference.media_encoder import MediaEncoder
from chatbind_cli.media.root import MediaRoot
from chatbind_cli.serving.limits import Limits
from tests.serving.conftest import serving

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def block(language, number=0):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)[number]


@pytest.mark.slow
def test_the_examples_work_as_they_stand(quick_world):
    folder, _ = quick_world
    loaded = load_model(folder / "model", device="cpu")
    root = MediaRoot.guarded(folder / "media", remote=False, most_bytes=1 << 20, seconds=1.0)
    with serving(Answerer(loaded, MediaEncoder(loaded, open_media=root.open))) as server:

        def run(*words):
            words = [word.replace("http://localhost:8000", server.url) for word in words]
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout

        replies = [run("bash", "-c", line) for line in block("sh", 1).splitlines()]
        answers = run(sys.executable, "-c", block("py")).splitlines()
    for reply in replies:
        for event in reply.removesuffix("data: [DONE]\n\n").split("\n\n"):
            if event:
                assert "error" not in json.loads(event.removeprefix("data: ")), reply
    assert [len(reply) > 50 for reply in replies] == [True] * 7
    assert "[DONE]" in replies[4] and all(answers) and len(answers) == 3


def test_the_limits_are_those_of_the_table():
    table = TEXT.partition("## Limits")[2].partition("## Who")[0]
    limits = Limits()
    for said in (
        f"{limits.body_bytes >> 20} MiB",
        f"to be exact) | {limits.values:,}",
        f"together | {limits.bodies} times",
        f"{limits.body_s:g} s, and {limits.body_rate // 1000} kB/s",
        f"idle between two | {limits.idle_s:g} s",
        f"of its answer | {limits.stalled_s:g} s",
        f"{limits.waiting} (`--max-waiting`)",
        f"{limits.request_s:g} s (`--timeout`)",
        f"{limits.grace_s:g} s (`--grace`)",
    ):
        assert said in table, said
    assert f"at most {limits.inputs} texts" in TEXT

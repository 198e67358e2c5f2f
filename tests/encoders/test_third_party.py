"""The encoder of another package that docs/encoders.md shows, installed and used as it stands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "encoders.md").read_text(encoding="utf-8")

PROGRAM = """
import json, sys
from chatbind_cli.cli import run
for words in json.loads(sys.argv[1]):
    code, message = run(words)
    if code:
        sys.exit(f"{words}: {message}")
"""


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return str(found)


def test_the_encoder_of_the_page_encodes_trains_and_answers(
    quick_world: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    code = block("py")
    assert len([line for line in code.splitlines() if line.strip()]) <= 32
    project = tomllib.loads(block("toml"))["project"]
    (point,) = project["entry-points"]["chatbind.encoders"].items()
    site = tmp_path / "site"
    facts = site / f"{project['name']}-{project['version']}.dist-info"
    facts.mkdir(parents=True)
    (site / f"{project['name']}.py").write_text(code)
    known = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (facts / "METADATA").write_text(known)
    (facts / "entry_points.txt").write_text("[chatbind.encoders]\n{} = {}\n".format(*point))
    encoder = f"{point[0]}:8"
    world, _ = quick_world
    picture = str(world / "media" / "image" / "heldout-0001.png")
    media = ["--media-root", str(world / "media")]
    llama = ["-m", str(world / "llama")]
    data = ["--data", str(world / "train" / "captions.json")]
    pretrain = ["pretrain", *llama, "--encoder", encoder, *data, *media, "--max-steps", "2"]
    asked = ["ask", *llama, "--projector", "one/projector.safetensors", "-a", picture]
    calls = [
        ["encode", "--encoder", encoder, picture, "-o", "e.jsonl"],
        [*pretrain, "-o", "one"],
        [*asked, "--json", "--max-new-tokens", "4", "Which digit is this?"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(calls)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (record,) = map(json.loads, (tmp_path / "e.jsonl").read_text().splitlines())
    assert len(record["embedding"]) == 3 * 8 * 8
    assert "licence of the weights of thumbnails-8: Apache 2.0" in done.stderr
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["encoder"]["path"] == encoder
    assert json.loads(done.stdout.splitlines()[-1])["text"] is not None

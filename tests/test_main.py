"""`python -m chatbind_cli` in a checkout that nothing has installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]


def test_a_bare_checkout_runs_its_own_commands(tmp_path: Path) -> None:
    for name in ("chatbind_cli", "commands"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    toy = tmp_path / "commands" / "toy.py"
    toy.write_text(toy.read_text().replace("chatbind toy small", "chatbind toy of-this-checkout"))
    # -S reads no .pth file, and so no editable installation; libraries come from the path
    libraries = str(Path(click.__file__).parents[1])
    for flags in (["-S"], []):
        done = subprocess.run(
            [sys.executable, *flags, "-m", "chatbind_cli", "toy", "--help"],
            cwd=tmp_path,
            env={"PYTHONPATH": libraries},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "chatbind toy of-this-checkout" in done.stdout

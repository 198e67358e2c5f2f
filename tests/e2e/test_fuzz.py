"""A small part of `benchmarks/fuzz.py`: 140 mutants through the real commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz.py"
SAMPLE = ["--media", "68", "--records", "40", "--weights", "30", "--patience", "4"]


@pytest.mark.slow
def test_no_mutant_ends_a_command_badly() -> None:
    done = subprocess.run(
        [sys.executable, CAMPAIGN, *SAMPLE],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    findings = [line for line in lines if "problem" in line]
    told = [f"{f['name']}: {f['problem']}\n  {f['command']}\n  {f['stderr']}" for f in findings]
    assert not findings, "\n".join(told)
    assert done.returncode == 0, done.stderr
    runs = {line["format"]: line["runs"] for line in lines if line.get("runs")}
    assert len(runs) >= 57 and sum(runs.values()) >= 135

"""A run that is killed and started again ends as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chatbind_cli.cli import run
from chatbind_cli.jsonl import read_records

# 4 epochs of 8 steps, checkpoints that fall inside epochs, a language model with dropout
WORDS = (
    *("--num-train-epochs", "4", "--learning-rate", "0.01"),
    *("--save-steps", "3", "--save-total-limit", "2"),
)
STEPS = 32


def sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "projector.safetensors").read_bytes()).hexdigest()


def kill_at(step: int, words: list[str]) -> None:
    """Runs the command and kills it as soon as it has logged a step."""
    process = subprocess.Popen(
        [sys.executable, "-m", "chatbind_cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        text=True,
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line).get("step") == step:
                os.kill(process.pid, signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run(["pretrain", *world.args(out, *WORDS, source="media")]) == (0, "")
    return out


@pytest.mark.slow
def test_a_run_killed_twice_gives_the_same_file(world, here, undisturbed, tmp_path) -> None:
    out = tmp_path / "out"
    words = ["pretrain", *world.args(out, *WORDS, source="media")]
    # before the first checkpoint, and inside the second epoch
    for step in (2, 14):
        kill_at(step, words)
    done = here(*words)
    assert done.code == 0, done.stderr
    assert "going on from step" in done.stderr
    assert sha256(out) == sha256(undisturbed)
    log = [record for record, _ in read_records(out / "log.jsonl")]
    assert [record["step"] for record in log] == list(range(1, STEPS + 1))
    whole = [record for record, _ in read_records(undisturbed / "log.jsonl")]
    assert [record["loss"] for record in log] == [record["loss"] for record in whole]


def unfinish(folder: Path, *kept: str) -> None:
    """Takes a run back to before its result was written; to these checkpoints, if any are said."""
    noted = json.loads((folder / "run.json").read_text())
    del noted["artifact"]
    (folder / "run.json").write_text(json.dumps({**noted, "status": "running"}))
    for checkpoint in folder.glob("checkpoint-*") if kept else ():
        if checkpoint.name not in kept:
            shutil.rmtree(checkpoint)
    for name in ("adapter_model", "model", "projector"):
        (folder / f"{name}.safetensors").unlink(missing_ok=True)
    for name in ("config.json", "loss.svg"):
        (folder / name).unlink()


def copied(undisturbed: Path, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    unfinish(out)
    return out


def test_a_kill_after_the_last_step_leaves_only_the_result_to_write(
    world, here, undisturbed, tmp_path
) -> None:
    out = copied(undisturbed, tmp_path)
    done = here("pretrain", *world.args(out, *WORDS, source="media"))
    assert done.code == 0, done.stderr
    assert [record.get("step") for record in done.records] == [None]
    assert sha256(out) == sha256(undisturbed)
    assert (out / "loss.svg").exists()


def test_steps_are_counted_where_they_end_inside_an_epoch(world, here, tmp_path) -> None:
    out = tmp_path / "out"
    words = ("pretrain", *world.args(out, "--max-steps", "5", "--learning-rate", "0.01"))
    assert here(*words).code == 0
    first = sha256(out)
    unfinish(out)
    done = here(*words)
    assert done.code == 0, done.stderr
    assert sha256(out) == first


def test_a_half_written_checkpoint_is_passed_over(world, here, undisturbed, tmp_path) -> None:
    out = copied(undisturbed, tmp_path)
    newest = out / "checkpoint-32"
    (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:100])
    (out / ".saving" / "checkpoint-33").mkdir(parents=True)
    done = here("pretrain", *world.args(out, *WORDS, source="media"))
    assert done.code == 0, done.stderr
    assert "going on from step 30 of 32" in done.stderr
    assert [r["step"] for r in done.records[:-1]] == [31, 32]
    assert sha256(out) == sha256(undisturbed)
    assert not (out / ".saving").exists()


def test_the_samples_of_a_run_stay_the_same_when_a_broken_file_is_mended(
    world, here, tmp_path
) -> None:
    media = tmp_path / "media"
    shutil.copytree(world.media, media)
    good = (media / "p1.png").read_bytes()
    (media / "p1.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    out = tmp_path / "out"
    words = ["pretrain", *world.args(out, "--max-steps", "4", "--on-error", "skip", source="media")]
    words[words.index("--media-root") + 1] = str(media)
    assert here(*words).code == 0
    first = sha256(out)
    unfinish(out)
    (media / "p1.png").write_bytes(good)
    done = here(*words)
    assert "15 conversations with 7 different media" in done.stderr
    assert sha256(out) == first

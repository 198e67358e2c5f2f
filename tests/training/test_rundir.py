"""A run's folder: claims, checkpoints that are whole, logs without doubles."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from chatbind_cli.errors import ChatBindError, CheckpointError
from chatbind_cli.folders import RECORD
from chatbind_cli.training.rundir import STAGING, RunFolder, is_complete, read_log


def staged(folder: RunFolder, step: int) -> Path:
    path = folder.path / STAGING / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_bytes(b"w" * step)
    return path


def claim(folder: RunFolder, identity: dict[str, object], *, overwrite: bool = False) -> None:
    with folder.claimed(identity, overwrite=overwrite):
        pass


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.path.mkdir()
    return made


def test_a_checkpoint_appears_under_its_name_only_when_it_is_whole(folder: RunFolder) -> None:
    half = staged(folder, 5)
    assert folder.last_checkpoint() is None
    final = folder.publish_checkpoint(half, keep=None)
    assert final == folder.last_checkpoint() == folder.path / "checkpoint-5"


@pytest.mark.parametrize("damage", ["cut", "gone", "no list"])
def test_a_damaged_newest_checkpoint_is_passed_over(folder: RunFolder, damage: str) -> None:
    for step in (5, 10):
        folder.publish_checkpoint(staged(folder, step), keep=None)
    newest = folder.path / "checkpoint-10"
    if damage == "cut":
        (newest / "weights").write_bytes(b"w")
    else:
        (newest / ("weights" if damage == "gone" else "manifest.json")).unlink()
    assert not is_complete(newest)
    assert folder.last_checkpoint() == folder.path / "checkpoint-5"
    folder.publish_checkpoint(staged(folder, 10), keep=None)
    assert folder.last_checkpoint() == newest


def test_only_as_many_checkpoints_stay_as_are_kept(folder: RunFolder) -> None:
    for step in (9, 10, 100):
        folder.publish_checkpoint(staged(folder, step), keep=2)
    # by number, not by name: 9 is older than 10
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-10", "checkpoint-100"]


def test_other_arguments_are_refused_with_the_name_of_the_difference(folder: RunFolder) -> None:
    claim(folder, {"learning_rate": 0.1, "layers": ("a",)})
    claim(folder, {"learning_rate": 0.1, "layers": ("a",)})
    with pytest.raises(CheckpointError, match=r"learning-rate 0\.1, and this one has 0\.2"):
        claim(folder, {"learning_rate": 0.2, "layers": ("a",)})


def test_overwrite_replaces_what_runs_made_and_nothing_beside_it(folder: RunFolder) -> None:
    claim(folder, {"a": 1})
    folder.publish_checkpoint(staged(folder, 5), keep=None)
    result = folder.path / STAGING / "result"
    result.mkdir(parents=True)
    (result / "model.safetensors").write_bytes(b"m")
    folder.publish_files(result, last="config.json")
    (folder.path / "log.jsonl").write_text("")
    foreign = folder.path / "checkpoint-5" / "thesis.txt"
    foreign.write_text("mine")
    before = tree(folder.path)
    with pytest.raises(ChatBindError, match=r"checkpoint-5/thesis\.txt: is on no record"):
        claim(folder, {"a": 2}, overwrite=True)
    assert tree(folder.path) == before
    foreign.unlink()
    claim(folder, {"a": 2}, overwrite=True)
    assert sorted(p.name for p in folder.path.iterdir()) == [RECORD, ".lock", "run.json"]


def test_a_checkpoint_of_somebody_else_is_neither_counted_nor_removed(folder: RunFolder) -> None:
    claim(folder, {})
    for name in ("checkpoint-1", "checkpoint-10", "checkpoint-99"):
        (folder.path / name).mkdir()
        (folder.path / name / "thesis.txt").write_text("mine")
    for step in (5, 7):
        folder.publish_checkpoint(staged(folder, step), keep=1)
    names = ["checkpoint-1", "checkpoint-7", "checkpoint-10", "checkpoint-99"]
    assert [path.name for path in folder.checkpoints()] == names
    with pytest.raises(OSError, match="not empty"):
        folder.publish_checkpoint(staged(folder, 10), keep=1)
    assert (folder.path / "checkpoint-10/thesis.txt").read_text() == "mine"


def test_a_result_does_not_take_the_place_of_somebody_s_file(folder: RunFolder) -> None:
    claim(folder, {})
    (folder.path / "README.md").write_text("mine")
    result = folder.path / STAGING / "result"
    result.mkdir(parents=True)
    (result / "README.md").write_text("ours")
    with pytest.raises(CheckpointError, match=r"README\.md: is in the way"):
        folder.publish_files(result, last="config.json")
    assert (folder.path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("name", ["thesis.tex", "run.json", ".lock"])
def test_a_folder_of_somebody_else_is_refused_and_stays_as_it_is(
    folder: RunFolder, name: str
) -> None:
    (folder.path / name).write_text('{"mine": 1}')
    before = tree(folder.path)
    for overwrite in (False, True):
        with pytest.raises(ChatBindError, match=rf"{name}: is (on no record|not of a training)"):
            claim(folder, {}, overwrite=overwrite)
    assert tree(folder.path) == before


def test_a_changed_input_is_noticed(folder: RunFolder) -> None:
    claim(folder, {})
    folder.confirm({"encoder_sha256": "a"})
    folder.confirm({"encoder_sha256": "a"})
    with pytest.raises(CheckpointError, match='encoder-sha256 "a", and this one has "b"'):
        folder.confirm({"encoder_sha256": "b"})


def test_the_log_loses_the_steps_that_are_done_again(folder: RunFolder) -> None:
    log = folder.path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": n}) + "\n" for n in range(1, 6)) + '{"step": 6')
    assert len(read_log(log)) == 5
    folder.cut_log(3)
    assert [record["step"] for record in read_log(log)] == [1, 2, 3]
    folder.cut_log(0)
    assert log.read_text() == ""


def test_a_second_run_waits_outside(folder: RunFolder) -> None:
    script = (
        "import sys, pathlib\n"
        "from chatbind_cli.training.rundir import RunFolder\n"
        "with RunFolder(pathlib.Path(sys.argv[1])).claimed({}):\n"
        "    print('in', flush=True); sys.stdin.read()\n"
    )
    words = [sys.executable, "-c", script, str(folder.path)]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdin is not None
    assert other.stdout.readline() == b"in\n"
    with pytest.raises(ChatBindError, match="another process is writing it"):
        claim(folder, {})
    other.kill()
    other.wait()
    other.stdin.close()
    other.stdout.close()
    claim(folder, {})


def test_a_broken_run_file_is_an_error_of_one_line(folder: RunFolder) -> None:
    (folder.path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json: cannot be read as JSON"):
        folder.finished_artifact()

"""`chatbind vqa --num-processes`: real workers, and what is left when one of them, or all, die."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from chatbind_cli import cli
from chatbind_cli.errors import SomeRecordsFailed
from chatbind_cli.jsonl import dumps
from tests.inference.test_batch_files import BATCH, requests
from tests.inference.world import World, questions, read_jsonl, start, write_jsonl
from tests.waiting import gone, wait_until

pytestmark = pytest.mark.slow

# whoever opens this file is killed, as one is that takes all memory for it
KILLER = """
import os, signal, sys

def kill(event, args):
    if event == "open" and str(args[0]).endswith("killer.png"):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
"""


def words(world: World, *more: str | Path, tokens: int = 8) -> list[str]:
    fixed = ["vqa", "-m", world.model, "--media-root", world.media, "--device", "cpu"]
    fixed += ["--max-new-tokens", str(tokens), "--batch-size", "4"]
    return [*map(str, fixed), *map(str, more)]


def alone(world: World, path: Path, output: Path, **options: Any) -> None:
    line = words(world, "-q", path, "-o", output, **options)
    assert CliRunner().invoke(cli.app, line).exception is None


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def has_lines(path: Path, count: int) -> bool:
    return path.exists() and path.read_bytes().count(b"\n") >= count


def test_workers_that_die_cost_no_answer_and_a_question_that_kills_them_is_one_failed_record(
    world: World, tmp_path: Path
) -> None:
    asked = questions(120)
    path, whole = write_jsonl(tmp_path / "q.jsonl", asked), tmp_path / "whole.jsonl"
    alone(world, path, whole)
    media = shutil.copytree(world.media, tmp_path / "media")
    shutil.copy(media / "0.png", media / "killer.png")
    killer = {"question_id": "k", "text": "What is this?", "image": "killer.png"}
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(KILLER)
    out = tmp_path / "a.jsonl"
    process = start(
        *words(world, "--media-root", media, "-o", out, "--num-processes", "2"),
        stdin=subprocess.PIPE,
        env={"PYTHONPATH": str(tmp_path / "site")},
    )
    assert process.stdin is not None
    process.stdin.write("".join(dumps(one) + "\n" for one in asked[:60]).encode())
    process.stdin.flush()
    wait_until(lambda: has_lines(out, 5), process)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    rest = "".join(dumps(one) + "\n" for one in [killer, *asked[60:]]).encode()
    _, stderr = process.communicate(rest, timeout=240)
    assert process.returncode == 3, stderr.decode()
    told = stderr.decode()
    assert told.count("chatbind: lost process") == 3
    assert "Traceback" not in told
    assert told.splitlines()[-1].startswith("chatbind: error: 1 of 121 questions failed; the first")
    records = read_jsonl(out)
    failed = records.pop(60)
    assert failed["question_id"] == "k"
    assert "two processes have died with it; lost process" in failed["error"]
    assert records == read_jsonl(whole)


def test_what_is_left_of_a_leader_that_is_killed_is_continued_to_the_same_bytes(
    world: World, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", questions(60))
    whole, out = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    alone(world, path, whole)
    process = start(*words(world, "-q", path, "-o", out, "--num-processes", "2"))
    wait_until(lambda: has_lines(out, 7), process)
    workers = workers_of(process)
    assert len(workers) == 2
    process.kill()
    process.communicate()
    killed = time.monotonic()
    wait_until(lambda: all(map(gone, workers)))
    assert time.monotonic() - killed < 5
    lines = [line for line in out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert 7 <= len(lines) < 60
    assert set(lines) <= set(whole.read_bytes().splitlines(keepends=True))
    alone(world, path, out)
    assert out.read_bytes() == whole.read_bytes()


def test_under_somebodys_launcher_the_first_process_leads(world: World, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", questions(19))
    whole, out = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    alone(world, path, whole)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    line = [*launcher, "-m", "chatbind_cli", *words(world, "-q", path, "-o", out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, env=environment, check=False, timeout=240)
    assert done.returncode == 0, done.stderr.decode()
    assert out.read_bytes() == whole.read_bytes()


def test_tasks_of_srun_come_to_the_first(world: World, tmp_path: Path) -> None:
    # with the lines of a batch file, which are to come out of several processes as of one
    path = write_jsonl(tmp_path / "b.jsonl", requests(world))
    whole, out = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    result = CliRunner().invoke(cli.app, words(world, "-q", path, "-o", whole, *BATCH))
    assert isinstance(result.exception, SomeRecordsFailed)
    srun = [sys.executable, "tests/cluster/srun", "--ntasks-per-node=2", sys.executable]
    line = [*srun, "-m", "chatbind_cli", *words(world, "-q", path, "-o", out, *BATCH)]
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "here"}
    environment = {**os.environ, **step, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(["", os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(line, capture_output=True, env=environment, check=False, timeout=240)
    assert done.returncode == 3
    *notes, last = done.stderr.decode().splitlines()
    assert last.startswith("chatbind: error: 3 of 12 questions failed; the first: ")
    assert all("asks for gpt-4o-mini" in note for note in notes) and len(notes) == 1
    assert out.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("chatbind-*"))


def test_the_answers_to_all_shards_are_those_to_the_file(world: World, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", questions(11))
    whole = tmp_path / "whole.jsonl"
    alone(world, path, whole)
    for shard in (
        ["--shard", "1/3"],
        ["--shard", "2/3"],
        ["--num-chunks", "3", "--chunk-idx", "2"],
    ):
        line = words(world, "-q", path, *shard)
        result = CliRunner().invoke(cli.app, line)
        assert result.exception is None
        (tmp_path / f"part-{'-'.join(shard).replace('/', '-')}").write_text(result.stdout)
    parts = sorted(tmp_path.glob("part-*"), key=lambda part: "num" in part.name)
    joined = b"".join(part.read_bytes() for part in parts)
    assert joined == whole.read_bytes()
    from_pipe = CliRunner().invoke(cli.app, words(world, "--shard", "2/3"), input=path.read_text())
    ids = [json.loads(line)["question_id"] for line in from_pipe.stdout.splitlines()]
    assert ids == [1, 4, 7, 10]

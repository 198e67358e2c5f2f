"""Who works on a command whose items are shared out, and where that is refused."""

from __future__ import annotations

import os
import shlex
import socket
import sys
import threading
from pathlib import Path

import pytest

from chatbind_cli import hardware, worker, worker_pool
from chatbind_cli.errors import LaunchError, UsageError
from chatbind_cli.plan import Dispatch
from chatbind_cli.worker_pool import Door, WorkerPool, WorkerProcess, line_to_first, pool_of

WORDS = ["vqa", "-m", "a b"]


@pytest.fixture(autouse=True)
def _plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM", "LOCAL_")) or name in ("RANK", "WORLD_SIZE", worker.LINE):
            monkeypatch.delenv(name)
    monkeypatch.setattr(hardware, "gpu_count", lambda: 0)


def launched(monkeypatch: pytest.MonkeyPatch, **values: int) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def step(monkeypatch: pytest.MonkeyPatch, tasks: int, rank: int, hosts: str) -> None:
    launched(monkeypatch, SLURM_JOB_ID=47, SLURM_STEP_ID=0, SLURM_NTASKS=tasks, SLURM_PROCID=rank)
    monkeypatch.setenv("SLURM_STEP_NODELIST", hosts)


def test_one_process_works_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    found = pool_of(WORDS, Dispatch())
    assert found is not None
    assert (found.size, found.follows) == (1, False)
    monkeypatch.setattr(hardware, "gpu_count", lambda: 1)
    assert pool_of(WORDS, Dispatch()) == found


def test_there_is_a_worker_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "gpu_count", lambda: 4)
    found = pool_of(WORDS, Dispatch(), ["--model", "made"])
    assert found is not None
    assert found.size == 4
    assert found.line[1:] == (
        *("-m", "chatbind_cli", *WORDS, "--model", "made", "--num-processes", "4"),
    )


def test_a_dry_run_prints_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    plan = Dispatch(dry_run=True, num_processes=2)
    assert pool_of([*WORDS, "--num-processes", "2", "--dry-run"], plan) is None
    line = shlex.split(capsys.readouterr().out)
    assert line[1:] == ["-m", "chatbind_cli", *WORDS, "--num-processes", "2"]


def test_under_a_launcher_the_first_leads_and_others_have_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched(monkeypatch, RANK=1, WORLD_SIZE=3, LOCAL_WORLD_SIZE=3)
    assert pool_of(WORDS, Dispatch()) is None
    launched(monkeypatch, RANK=0)
    found = pool_of(WORDS, Dispatch())
    assert found is not None
    assert found.size == 3
    launched(monkeypatch, WORLD_SIZE=6)
    with pytest.raises(UsageError, match="--shard"):
        pool_of(WORDS, Dispatch())


@pytest.mark.parametrize("tasks", [2, 4])
def test_a_step_on_several_machines_is_refused(monkeypatch: pytest.MonkeyPatch, tasks: int) -> None:
    step(monkeypatch, tasks, 0, "node[07-08]")
    with pytest.raises(UsageError, match=r"works on one machine; .*--shard"):
        pool_of(WORDS, Dispatch())


def test_a_worker_is_a_worker_whatever_its_words_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(worker.LINE, "3")
    assert pool_of(WORDS, Dispatch(num_processes=2)) == WorkerPool(follows=True)


_SHOW = """
import os, sys
from chatbind_cli import worker_pool
line = worker_pool.line_to_leader()
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE OMP_NUM_THREADS".split()
print("for nobody to read")
said = [os.environ[name] for name in names], sys.stdin.read(), os.getsid(0) == os.getpid()
worker_pool.say(line, (said, os.get_inheritable(line.fileno())))
"""


def test_a_worker_has_its_place_a_line_and_no_streams(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(worker_pool, "cpu_count", lambda: 8)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
    process = WorkerProcess.started(WorkerPool(2, (sys.executable, "-c", _SHOW)), 1)
    said, inheritable = worker_pool.hear(process.line)
    assert said == (["1", "1", "2", "2", "4"], "", True)
    assert not inheritable
    assert process.end() == (
        f"lost process 1 on {socket.gethostname()}: it has ended with exit code 0"
    )
    assert capfd.readouterr() == ("", "for nobody to read\n")


def test_tasks_of_a_step_come_in_by_a_door(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    arrived = []
    door = Door("47.0")
    for rank in (1, 2):
        worker_pool.say(line_to_first("47.0"), rank)
        arrived.append(WorkerProcess.come(door))
    assert [process.rank for process in arrived] == [1, 2]
    assert "process 2" in arrived[1].end()
    door.close()
    assert not list(tmp_path.iterdir())


def test_a_door_that_others_may_open_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("CHATBIND_MEETING_SECONDS", "1")
    (tmp_path / f"chatbind-{os.getuid()}-47.0").mkdir(mode=0o755)
    for come in (Door, line_to_first):
        with pytest.raises(LaunchError, match="is not this user's alone"):
            come("47.0")
    with pytest.raises(LaunchError, match="process 0 of step 48.0 does not answer"):
        line_to_first("48.0")


def test_a_task_waits_for_the_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    doors: list[Door] = []
    opener = threading.Timer(0.3, lambda: doors.append(Door("47.0")))
    opener.start()
    line_to_first("47.0").close()
    opener.join()
    doors[0].close()

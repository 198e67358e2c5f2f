"""Dispatch: what is launched, with which words, and what comes back from the workers."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from chatbind_cli import hardware, launch, worker
from chatbind_cli.errors import LaunchError, Terminated, UsageError
from chatbind_cli.plan import Dispatch
from tests.waiting import gone, wait_until

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _plain_machine(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "CHATBIND_STATUS_FOLDER", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hardware, "gpu_count", lambda: 0)


def printed(capsys, plan, args=("pretrain", "-m", "a b")):
    assert launch.dispatch(args, plan)
    return shlex.split(capsys.readouterr().out)


def test_one_cpu_process_runs_in_place():
    assert launch.dispatch(["vqa"], Dispatch()) is False


def test_a_dry_run_in_place_prints_the_command_itself(capsys):
    line = printed(capsys, Dispatch(dry_run=True))
    assert line[1:] == ["-m", "chatbind_cli", "pretrain", "-m", "a b"]


def test_two_cpu_processes_go_through_accelerate(capsys):
    line = printed(capsys, Dispatch(num_processes=2, dry_run=True))
    assert line[0] == "ACCELERATE_USE_CPU=true"
    assert line[2:4] == ["-m", "accelerate.commands.launch"]
    assert line[line.index("--num_processes") + 1] == "2"
    assert line[-5:] == ["-m", "chatbind_cli", "pretrain", "-m", "a b"]


def test_gpu_work_is_launched_with_one_process_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(hardware, "gpu_count", lambda: 4)
    line = printed(capsys, Dispatch(dry_run=True))
    assert "ACCELERATE_USE_CPU=true" not in line
    assert line[line.index("--num_processes") + 1] == "4"


def test_several_machines_need_a_meeting_point(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(UsageError, match="--main-address"):
        launch.dispatch(["vqa"], Dispatch(num_machines=2, num_processes=2))


def test_a_worker_does_not_launch_again(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert launch.dispatch(["vqa"], Dispatch(num_processes=2)) is False


def outcome(folder, rank, code, message=""):
    record = {"rank": rank, "exit_code": code, "message": message}
    (folder / f"rank-{rank:05}.json").write_text(json.dumps(record))


def test_the_parent_takes_the_failing_worker_s_code_and_words(tmp_path):
    outcome(tmp_path, 0, 130, "chatbind: interrupted")
    outcome(tmp_path, 1, 3, "chatbind: error: 2 records failed")
    with pytest.raises(launch.WorkerFailed) as caught:
        launch._raise_outcome(tmp_path, 1)
    assert (caught.value.exit_code, str(caught.value)) == (3, "2 records failed")


def test_a_message_from_elsewhere_names_its_machine_once():
    failed = launch.WorkerFailed
    assert str(failed(1, "chatbind: error: no such file", "node07")) == "node07: no such file"
    assert str(failed(1, "lost process 3 on node07: gone", "node07")) == (
        "lost process 3 on node07: gone"
    )
    assert str(failed(1, "no such file", socket.gethostname())) == "no such file"
    assert str(failed(75, "chatbind: told to stop", "node07")) == "told to stop"


def test_an_error_is_nearer_to_the_cause_than_a_connection_that_ended_before(tmp_path):
    for rank, message, time_s in ((0, "chatbind: internal error: gloo", 1), (1, "no file", 2)):
        said = {"rank": rank, "exit_code": 1, "message": message, "time_s": time_s}
        worker.leave_outcome(tmp_path, said)
    with pytest.raises(launch.WorkerFailed, match="no file"):
        launch._raise_outcome(tmp_path, 1)


def test_workers_that_die_without_a_word_are_an_error(tmp_path):
    outcome(tmp_path, 0, 0)
    with pytest.raises(LaunchError, match="no worker said why"):
        launch._raise_outcome(tmp_path, 1)
    launch._raise_outcome(tmp_path, 0)


def test_the_worker_that_was_killed_is_the_cause_whoever_speaks_first(tmp_path, monkeypatch):
    monkeypatch.setenv("CHATBIND_STATUS_FOLDER", str(tmp_path))
    outcome(tmp_path, 0, 1, "chatbind: internal error: RuntimeError: gloo")
    monkeypatch.setenv("RANK", "1")
    worker.report_killed(signal.SIGKILL)
    with pytest.raises(
        launch.WorkerFailed, match=r"lost process 1 on .*: killed by signal 9 \(SIGKILL\)"
    ):
        launch._raise_outcome(tmp_path, 1)


_PARENT = """
import sys
from chatbind_cli import launch, worker
from chatbind_cli.errors import ChatBindError, Terminated
from chatbind_cli.plan import Dispatch
launch._worker_command = lambda args, extra: list(args)
launch._launcher = lambda plan: [sys.executable]
try:
    launch.dispatch(sys.argv[1:], Dispatch(num_processes=2, device="cpu"))
except ChatBindError as error:
    sys.exit(f"{error.exit_code} {error}")
except Terminated as error:
    sys.exit(error.exit_code)
"""

# a launcher that waits for its workers, whatever they end with
_LAUNCHER = """
import os, subprocess, sys
worker = open("work.py").read()
workers = [
    subprocess.Popen([sys.executable, "-c", worker], env={**os.environ, "RANK": str(rank)})
    for rank in range(2)
]
open("pids.tmp", "w").write(" ".join(str(w.pid) for w in workers))
os.rename("pids.tmp", "pids")
for worker in workers:
    worker.wait()
"""


@pytest.fixture
def parent(tmp_path):
    """Starts a parent of two workers that run the given lines and then sleep."""

    def start(lines=""):
        (tmp_path / "work.py").write_text(
            "import os, time\n"
            "from chatbind_cli import worker\n"
            f"worker.work_in_child()\nworker.watch_parent()\n{lines}\ntime.sleep(60)\n"
        )
        return subprocess.Popen(
            [sys.executable, "-c", _PARENT, "-c", _LAUNCHER],
            cwd=tmp_path,
            env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def _gone(tmp_path):
    pids = (tmp_path / "pids").read_text().split()
    wait_until(lambda: all(map(gone, pids)))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path, parent, number):
    process = parent()
    wait_until((tmp_path / "pids").exists)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == (Terminated.exit_code if number == signal.SIGTERM else -number)
    _gone(tmp_path)
    wait_until(lambda: not list(tmp_path.glob("chatbind-*")))


_LISTENING = """
from chatbind_cli import stopping
with stopping.listening():
    open(f"work-{worker.rank()}", "w").close()
    while not stopping.requested() or os.path.exists("busy"):
        time.sleep(0.05)
    worker.report_outcome(75, "chatbind: stopped")
    exit()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_that_train_are_asked_to_stop_and_waited_for(tmp_path, parent, number):
    process = parent(_LISTENING)
    wait_until(lambda: len(list(tmp_path.glob("work-*"))) == 2)
    process.send_signal(number)
    _, message = process.communicate(timeout=20)
    first, last = message.splitlines()
    assert first.startswith("chatbind: stopping after this step, with a checkpoint")
    assert last == "75 stopped"
    _gone(tmp_path)


def test_a_second_ctrl_c_does_not_wait_for_workers(tmp_path, parent):
    (tmp_path / "busy").touch()
    process = parent(_LISTENING)
    wait_until(lambda: len(list(tmp_path.glob("work-*"))) == 2)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: list(tmp_path.glob("chatbind-*/pressed")))
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    _gone(tmp_path)


_TERMINATED = """
import os, signal
from pathlib import Path
from chatbind_cli import launch
def terminate():
    Path("pids").write_text(str(os.getpid()))
    os.kill(os.getppid(), signal.SIGTERM)
launch._run_workers(["sleep", "20"], {}, preexec_fn=terminate)
"""


def test_sigterm_while_the_launcher_is_started_ends_it(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", _TERMINATED]
    how = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True}
    done = subprocess.run(line, timeout=15, check=False, **how)  # until nobody has its streams
    assert done.stderr.endswith("Terminated: was sent SIGTERM\n")
    _gone(tmp_path)


def _fail_meanwhile(folder):
    wait_until(Path("pids").exists)
    raise UsageError("found meanwhile")


def test_what_fails_while_workers_start_ends_them(tmp_path, monkeypatch):
    (tmp_path / "work.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "_worker_command", lambda args, extra: list(args))
    monkeypatch.setattr(launch, "_launcher", lambda plan: [sys.executable])
    plan = Dispatch(num_processes=2, device="cpu")
    with pytest.raises(UsageError, match="found meanwhile"):
        launch.dispatch(["-c", _LAUNCHER], plan, (), _fail_meanwhile)
    _gone(tmp_path)
    assert launch.dispatch(["vqa"], Dispatch(), (), _fail_meanwhile) is False


def test_one_failed_worker_ends_the_others_and_is_heard(tmp_path, parent):
    process = parent("if worker.rank() == 1: worker.report_outcome(3 - 1, 'bad words'); exit()")
    _, message = process.communicate(timeout=20)
    assert message == "2 bad words\n"
    assert process.returncode == 1
    _gone(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_the_signal_that_killed_a_worker_is_told(tmp_path, parent, number):
    process = parent(f"if worker.rank() == 1: os.kill(os.getpid(), {number:d})")
    _, message = process.communicate(timeout=20)
    assert message.startswith(f"1 lost process 1 on {socket.gethostname()}: killed by signal ")
    assert f"{number:d} ({number.name})" in message
    _gone(tmp_path)


def test_a_worker_does_not_outlive_the_process_that_waits_for_it(tmp_path, parent):
    process = parent("open(f'work-{worker.rank()}', 'w').write(str(os.getpid()))")
    wait_until(lambda: (tmp_path / "work-1").exists() and (tmp_path / "work-1").read_text())
    os.kill(int((tmp_path / "pids").read_text().split()[1]), signal.SIGKILL)
    _, message = process.communicate(timeout=20)
    assert message.startswith("1 lost process 1 on ")
    assert "killed by signal 9 (SIGKILL);" in message


_TALKING = """
import os, signal, sys
from chatbind_cli import worker
worker.work_in_child()
worker.watch_parent()
import torch, torch.distributed as dist
dist.init_process_group("gloo")
try:
    for step in range(10**9):
        if worker.rank() == 1 and step == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))
except RuntimeError as error:
    worker.report_outcome(1, f"internal error: {error}")
"""


@pytest.mark.slow
def test_a_worker_killed_under_accelerate_is_the_cause_and_not_the_lost_connection(tmp_path):
    (tmp_path / "work.py").write_text(_TALKING)
    lines = [line for line in _PARENT.splitlines() if "launch._launcher" not in line]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), "work.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "lost process 1 on " in done.stderr.splitlines()[-1]
    assert "killed by signal 9 (SIGKILL);" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr

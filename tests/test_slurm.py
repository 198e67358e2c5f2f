"""Commands in SLURM's steps: what a task knows of itself, what it starts, and the batch script."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from threading import Thread

import pytest

from chatbind_cli import cli, hardware, launch, slurm, worker
from chatbind_cli.errors import Interrupted, UsageError
from chatbind_cli.meeting import PATIENCE, Member, meet
from chatbind_cli.plan import Dispatch

ROOT = Path(__file__).resolve().parent.parent
SRUN = Path(__file__).parent / "cluster" / "srun"


@pytest.fixture(autouse=True)
def _no_gpus(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hardware, "gpu_count", lambda: 0)


@pytest.fixture
def step(monkeypatch):
    """Puts this process into a step: which task of how many on which machines."""

    def enter(rank, tasks, hosts, per_node, **more):
        node = rank // per_node
        values = {"JOB_ID": "4711", "STEP_ID": "2", "PROCID": rank, "NTASKS": tasks}
        values |= {"STEP_NODELIST": hosts, "JOB_NODELIST": "other[1-9]", "NODEID": node}
        values |= {"LOCALID": rank % per_node, "STEP_TASKS_PER_NODE": f"{per_node}(x9)"}
        for name, value in {**values, **more}.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))

    return enter


@pytest.mark.parametrize(
    ("hosts", "names"),
    [
        ("a", "a"),
        ("a,b", "a b"),
        ("n[03-05,9],x", "n03 n04 n05 n9 x"),
        ("gpu-[008-010]-ib", "gpu-008-ib gpu-009-ib gpu-010-ib"),
        ("n[1-2].local", "n1.local n2.local"),
        ("a[1,3-5],b7", "a1 a3 a4 a5 b7"),
        ("r[1-2]n[08-09]", "r1n08 r1n09 r2n08 r2n09"),
        ("10.0.0.[9-11]", "10.0.0.9 10.0.0.10 10.0.0.11"),
        ("", ""),
    ],
)
def test_the_hosts_of_a_list(hosts, names):
    assert list(slurm.expand(hosts)) == names.split()


def test_a_task_knows_its_place(step):
    step(5, 12, "n[1-3]", 4)
    assert slurm.task() == slurm.Task("4711.2", 5, 1, 1, ("n1", "n2", "n3"), 12, 4)
    assert not slurm.task().one_a_machine


def test_machines_may_have_different_numbers_of_tasks(step):
    step(5, 6, "n[1-3]", 2, NODEID=2, STEP_TASKS_PER_NODE="2(x2),1,1")
    assert slurm.task().local_tasks == 1


# the batch script has the variables of its job; its step is said not at all, or so
@pytest.mark.parametrize("number", ["", "4294967291", "4294967290"])
def test_a_batch_script_waits_for_nobody(step, number, capsys):
    step(0, 8, "n[1-2]", 4, STEP_ID=number, NNODES=2)
    assert slurm.task() is None
    assert launch.dispatch(["vqa"], Dispatch()) is False
    assert "this job has 2 machines, and works on this one alone" in capsys.readouterr().err


def printed(capsys, plan):
    assert launch.dispatch(["encode"], plan)
    return shlex.split(capsys.readouterr().out)


def test_one_task_a_machine_starts_its_workers(step, capsys, monkeypatch):
    monkeypatch.setattr(hardware, "gpu_count", lambda: 4)
    step(1, 2, "gpu-[007-008]-ib", 1)
    line = printed(capsys, Dispatch(dry_run=True))
    told = dict(pairwise(line))
    assert told["--num_processes"] == "8"
    assert told["--num_machines"] == "2"
    assert told["--machine_rank"] == "1"
    assert told["--main_process_ip"] == "gpu-007-ib"
    assert 20000 <= int(told["--main_process_port"]) < 32000


def test_each_of_several_tasks_a_machine_is_a_worker(step, capsys):
    step(5, 8, "n[1-2]", 4)
    line = printed(capsys, Dispatch(dry_run=True))
    told = dict(word.split("=") for word in line[: line.index(sys.executable)])
    assert told.pop("MASTER_PORT").isdecimal()
    assert told == {
        "ACCELERATE_USE_CPU": "true",
        **{"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
        "MASTER_ADDR": "n1",
    }
    assert line[-3:] == ["-m", "chatbind_cli", "encode"]


@pytest.mark.parametrize(("gpus", "local"), [(1, "0"), (4, "3")])
def test_a_task_takes_the_gpu_that_it_is_shown(step, monkeypatch, gpus, local):
    monkeypatch.setattr(hardware, "gpu_count", lambda: gpus)
    step(3, 4, "n1", 4)
    assert Dispatch().with_slurm().variables()["LOCAL_RANK"] == local


def test_one_task_alone_is_like_none(step):
    step(0, 1, "n1", 1)
    assert launch.dispatch(["vqa"], Dispatch()) is False


def test_the_environment_may_say_where_to_meet(step, monkeypatch):
    step(0, 2, "n[1-2]", 1)
    port = Dispatch().with_slurm().address()[1]
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    assert Dispatch().with_slurm().address() == ("elsewhere", port)
    monkeypatch.setenv("MASTER_PORT", "12345")
    assert Dispatch().with_slurm().address() == ("elsewhere", 12345)
    assert Dispatch(main_address="here:1").with_slurm().address() == ("here", 1)


def test_jobs_and_steps_meet_at_different_ports(step):
    ports = set()
    for job in (4711, 4712, 4713):
        for number in (0, 1):
            step(0, 2, "n[1-2]", 1, JOB_ID=job, STEP_ID=number)
            ports.add(slurm.task().port)
    assert len(ports) == 6


def test_what_does_not_go_together_is_refused(step):
    with pytest.raises(UsageError, match="7 cannot be shared out evenly to 2 machines"):
        launch.dispatch(["encode"], Dispatch(num_processes=7, num_machines=2, main_address="h:1"))
    with pytest.raises(UsageError, match="--machine-rank 2 is none of 2"):
        launch.dispatch(["encode"], Dispatch(num_machines=2, machine_rank=2, main_address="h:1"))
    step(0, 4, "n[1-2]", 2)
    with pytest.raises(UsageError, match="srun has started 4 tasks on 2 machine"):
        launch.dispatch(["encode"], Dispatch(num_processes=8))


def test_threads_are_shared_by_the_workers_of_a_machine(step, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for module in (hardware, worker):
        monkeypatch.setattr(module, "cpu_count", lambda: 12)
    plan = Dispatch(num_processes=8, num_machines=2)
    assert plan.preferences() == {"OMP_NUM_THREADS": "3"}
    step(3, 8, "n[1-2]", 4)
    assert Dispatch().with_slurm().preferences() == {"OMP_NUM_THREADS": "3"}
    step(3, 8, "n[1-2]", 4, CPUS_ON_NODE=48)  # each task has CPUs of its own
    assert Dispatch().with_slurm().preferences() == {"OMP_NUM_THREADS": "12"}
    assert worker.cpus() == 12
    step(1, 2, "n[1-2]", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert worker.cpus() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert plan.preferences() == {}


def test_cpus_are_those_that_this_process_may_use(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path)
    monkeypatch.setattr(hardware, "_OWN_CGROUP", tmp_path / "own")
    assert hardware.cpu_count() == 12
    (tmp_path / "own").write_text("3:cpuset:/x\n0::/job/step\n")
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "job" / "step" / "cpu.max").write_text("max 100000\n")
    assert hardware.cpu_count() == 12
    (tmp_path / "job" / "cpu.max").write_text("350000 100000\n")
    assert hardware.cpu_count() == 3


def test_the_interface_of_an_address():
    assert hardware.interface_of("127.0.0.1") == "lo"
    assert hardware.interface_of("203.0.113.9") is None


@pytest.fixture
def job(tmp_path):
    """Submits a script to a cluster of stand-ins; its step runs the given Python lines."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "srun").write_text(f'#!/bin/bash\nexec {sys.executable} {SRUN} "$@"\n')
    (bin_folder / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/scontrol\n')
    for file in bin_folder.iterdir():
        file.chmod(0o755)
    (tmp_path / "chatbind_cli").mkdir()
    (tmp_path / "chatbind_cli" / "__init__.py").touch()
    names = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_ON_NODE": "4"}
    names |= {"PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def submit(script, lines):
        (tmp_path / "chatbind_cli" / "__main__.py").write_text(lines)
        return subprocess.Popen(
            ["bash", "-c", script],
            cwd=tmp_path,
            env={**os.environ, **names},
            stdout=subprocess.PIPE,
            text=True,
        )

    return submit


def _script(capsys, *words, **plan):
    args = ["finetune", "-m", "a b", "--sbatch", *words]
    assert launch.dispatch(args, Dispatch(sbatch=True, **plan))
    return capsys.readouterr().out


def test_the_batch_script_asks_for_machines_and_gpus(capsys, step):
    step(0, 8, "n[1-2]", 4)  # whatever machine it is written on
    text = _script(capsys, num_machines=2, num_processes=8)
    assert text.startswith("#!/bin/bash\n#SBATCH --job-name=chatbind\n#SBATCH --nodes=2\n")
    assert "#SBATCH --gpus-per-node=4\n" in text
    assert f"{sys.executable} -m chatbind_cli finetune -m 'a b' &" in text
    assert "gpus-per-node" not in _script(capsys, device="cpu")
    with pytest.raises(UsageError, match="--sbatch needs --num-processes"):
        launch.dispatch(["vqa"], Dispatch(sbatch=True))
    with pytest.raises(UsageError, match="--overwrite"):
        _script(capsys, "--overwrite", num_processes=1)


def test_the_batch_script_starts_one_task_a_machine_and_ends_as_they_do(capsys, job, tmp_path):
    lines = "import os, sys\nrank = int(os.environ['SLURM_PROCID'])\n"
    lines += "print(f'{rank} {os.environ[\"SLURM_NTASKS\"]} {sys.argv[1:]}\\n', end='')\n"
    lines += "sys.exit(3 * rank)\n"
    process = job(_script(capsys, num_machines=2, num_processes=8), lines)
    out, _ = process.communicate(timeout=20)
    assert sorted(out.splitlines()) == [f"{n} 2 ['finetune', '-m', 'a b']" for n in (0, 1)]
    assert process.returncode == 3
    assert not (tmp_path / "scontrol").exists()


@pytest.mark.parametrize(
    ("number", "code", "requeued"),
    [
        (signal.SIGUSR1, Interrupted.exit_code, True),
        (signal.SIGUSR1, 0, False),  # it was done just then
        (signal.SIGTERM, Interrupted.exit_code, False),  # as `scancel` sends it
    ],
)
def test_a_job_whose_time_is_over_goes_back_into_the_queue(
    capsys, job, tmp_path, number, code, requeued
):
    lines = f"""\
import os, signal, sys, time
signal.signal({number:d}, lambda *_: (time.sleep(0.2), os._exit({code})))
open(os.environ["SLURM_PROCID"], "w").close()
time.sleep(20)
"""
    process = job(_script(capsys, num_machines=2, num_processes=8), lines)
    for _ in range(400):
        if (tmp_path / "0").exists() and (tmp_path / "1").exists():
            break
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == code
    log = tmp_path / "scontrol"
    assert (log.read_text() if log.exists() else "") == ("requeue 4711\n" if requeued else "")


@pytest.fixture
def other(monkeypatch, tmp_path):
    """Runs a command that cannot find its data, and another parent of the same step meanwhile."""

    def run(rank, step_name):
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.setenv(PATIENCE, "1")
        monkeypatch.setenv("CHATBIND_QUIET", "")
        met = []
        if rank is not None:
            member = Member(rank, 2, "node09", rank, 2, step_name)
            come = Thread(target=lambda: met.append(meet(member, "localhost", port)))
            come.start()
        words = ["pretrain", "-m", str(tmp_path), "--data", str(tmp_path / "missing.json")]
        words += ["-o", str(tmp_path / "out"), "--device", "cpu", "--num-machines", "2"]
        code, message = cli.run(words)
        heard = []
        if rank is not None:
            come.join()
            heard = met[0].exchange([])
            met[0].close()
        return code, message, heard

    return run


def test_machines_meet_before_anything_else(other):
    code, message, _ = other(None, "")
    assert (code, message.split(";")[0]) == (
        1,
        "chatbind: error: machine 1 did not answer within 1 s",
    )


def test_what_keeps_one_machine_from_starting_is_told_to_the_others(other):
    code, message, heard = other(1, "")
    assert code == 1
    assert "is no folder of a language model" in message
    (word,) = heard
    assert word["message"] == message
    assert (word["rank"], word["exit_code"]) == (0, 1)


def test_the_first_task_speaks_for_the_others(other, step):
    step(1, 2, "localhost,node09", 1)
    code, message, heard = other(0, "4711.2")
    assert (code, message) == (1, "")
    assert "is no folder of a language model" in heard[0]["message"]

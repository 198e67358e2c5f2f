"""Real processes of a launch over several machines, which are network namespaces of this one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = Path(__file__).parent / "cluster"


def _ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def machines():
    """Two machines whose only way to each other is a cable; 10.77.0.1 and 10.77.0.2."""
    if shutil.which("ip") is None:
        pytest.skip("needs `ip` (iproute2) to make network namespaces")
    names = [f"chatbind-{os.getpid()}-{n}" for n in (0, 1)]
    cable = [f"cb{os.getpid()}-{n}" for n in (0, 1)]
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
            _ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
            for n, (name, link) in enumerate(zip(names, cable, strict=True)):
                _ip("link", "set", link, "netns", name)
                _ip("-n", name, "addr", "add", f"10.77.0.{n + 1}/24", "dev", link)
                _ip("-n", name, "link", "set", link, "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"may not make network namespaces: {error.stderr.decode().strip()}")
        yield cable
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture
def srun(machines):
    """Runs `parent.py` as the tasks of a step on both machines."""

    def run(per_node, who_dies):
        task = [sys.executable, PARTS / "parent.py", str(2 * per_node), str(who_dies)]
        process = subprocess.Popen(
            [sys.executable, PARTS / "srun", f"--ntasks-per-node={per_node}", *task],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "SLURM_JOB_ID": "4711",
                "SLURM_JOB_NODELIST": "10.77.0.[1-2]",
                "SRUN_ENTER": f"ip netns exec chatbind-{os.getpid()}-{{node}}",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=120)
            return subprocess.CompletedProcess(task, process.returncode, out, err)
        finally:
            with suppress(ProcessLookupError):  # tasks, where they wait for each other for ever
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    return run


# by `accelerate launch` on each machine, and by SLURM alone
@pytest.mark.parametrize("per_node", [1, 2])
def test_a_worker_killed_on_the_other_machine_is_told_once(srun, machines, per_node):
    dies = 2 * per_node - 1
    done = srun(per_node, dies)
    # they had met, by the cable: gloo alone takes what the host's name means
    assert done.stdout == f"{machines[0]}\n", done.stderr
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "lost process" in line]
    assert line.startswith(f"1 lost process {dies} on 10.77.0.2: killed by signal 9 (SIGKILL)")

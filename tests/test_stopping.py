"""Signals that are noted, and the word of them that a parent leaves."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from chatbind_cli import stopping
from chatbind_cli.worker import STATUS_FOLDER


def test_a_signal_before_training_is_remembered_for_the_workers(tmp_path: Path) -> None:
    with stopping.noting(signal.SIGUSR1):
        stopping.pass_on(tmp_path)
        assert not list(tmp_path.iterdir())
        signal.raise_signal(signal.SIGUSR1)
        assert stopping.requested()
        stopping.pass_on(tmp_path)
    assert not stopping.requested()
    assert [file.name for file in tmp_path.iterdir()] == ["stop"]


def test_a_worker_reads_its_parent_s_word(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(STATUS_FOLDER, str(tmp_path))
    assert not stopping.ask(tmp_path)  # nobody listens yet: the workers have to be ended
    with stopping.listening():
        assert not stopping.requested()
        assert stopping.ask(tmp_path)
        assert stopping.requested()
    assert stopping.ask(tmp_path, pressed=True)
    assert not stopping.ask(tmp_path, pressed=True)


def test_ctrl_c_is_not_heard_in_a_shell_s_background_job(monkeypatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping.noting(*stopping.SIGNALS):
            signal.raise_signal(signal.SIGINT)
            assert not stopping.requested()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("by_parent", [True, False])
def test_a_loader_s_process_ends_at_its_parent_s_word_alone(by_parent: bool) -> None:
    ready, begun = os.pipe()
    child = os.fork()
    if child == 0:
        stopping.leave_to_parent(0)
        os.write(begun, b"1")
        time.sleep(60)
        os._exit(1)
    os.read(ready, 1)
    if by_parent:
        os.kill(child, signal.SIGTERM)
    else:
        other = os.fork()
        if other == 0:
            for number in stopping.SIGNALS:
                os.kill(child, number)
            os._exit(0)
        os.waitpid(other, 0)
        time.sleep(0.3)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (0 if by_parent else -signal.SIGKILL)
    os.close(ready), os.close(begun)

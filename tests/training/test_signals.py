"""A run that is told to stop saves, ends with its own code, and goes on as if nothing had been."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chatbind_cli.cli import run
from chatbind_cli.training import run as running
from chatbind_cli.training.trainer import ChatBindTrainer
from chatbind_cli.training.watch import Watch
from tests.training.conftest import environment
from tests.waiting import wait_until

# steps that end inside an epoch, a language model with dropout
WORDS = ("--max-steps", "6", "--learning-rate", "0.01", "--logging-steps", "4")
WORDS += ("--save-strategy", "no")
SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]


def sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "projector.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run(["pretrain", *world.args(out, *WORDS)]) == (0, "")
    return sha256(out)


@pytest.fixture
def at_step(monkeypatch) -> Callable[..., None]:
    """Has signals come in the middle of a step."""

    def arrange(step: int, *numbers: int) -> None:
        begin, begun = Watch.begin, 0

        def disturbed(self: Watch, samples: Sequence[Sequence[int]]) -> None:
            nonlocal begun
            begun += 1
            begin(self, samples)
            for number in numbers if begun == step else ():
                signal.raise_signal(number)

        monkeypatch.setattr(Watch, "begin", disturbed)

    return arrange


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_step_with_a_checkpoint(
    world, here, tmp_path, at_step, undisturbed, number
) -> None:
    out = tmp_path / "out"
    words = ("pretrain", *world.args(out, *WORDS))
    before = signal.getsignal(number)
    at_step(3, number)
    done = here(*words)
    assert done.code == 75
    line = done.stderr.splitlines()[-1]
    assert line.startswith("chatbind: told to stop after step 3 of 6, of which there is a ")
    assert line.endswith("; the same command goes on from it")
    assert [record["step"] for record in done.records] == [3]
    assert [folder.name for folder in out.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (out / "projector.safetensors").exists()
    assert signal.getsignal(number) == before
    again = here(*words)
    assert again.code == 0, again.stderr
    assert "going on from step 3 of 6" in again.stderr
    assert [record.get("step") for record in again.records] == [4, 6, None]
    assert sha256(out) == undisturbed


def test_a_second_ctrl_c_ends_at_once(world, here, tmp_path, at_step) -> None:
    at_step(2, signal.SIGUSR1, signal.SIGINT, signal.SIGINT)
    done = here("pretrain", *world.args(tmp_path / "out", *WORDS))
    assert done.code == 130
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_foretold_end_waits_for_the_first_step_and_ctrl_c_does_not(
    world, here, tmp_path, monkeypatch
) -> None:
    build = running.build_chatbind
    number = signal.SIGUSR1

    def disturbed(*args: object, **kwargs: object) -> object:
        signal.raise_signal(number)
        return build(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(running, "build_chatbind", disturbed)
    done = here("pretrain", *world.args(tmp_path / "out", *WORDS))
    assert done.code == 75
    assert "told to stop after step 1 of 6" in done.stderr
    number = signal.SIGINT
    assert here("pretrain", *world.args(tmp_path / "out", *WORDS)).code == 130


def test_the_result_is_written_to_its_end(world, here, tmp_path, monkeypatch, undisturbed) -> None:
    fit = ChatBindTrainer.fit

    def disturbed(self: ChatBindTrainer) -> None:
        fit(self)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.raise_signal(number)

    monkeypatch.setattr(ChatBindTrainer, "fit", disturbed)
    done = here("pretrain", *world.args(tmp_path / "out", *WORDS))
    assert done.code == 0, done.stderr
    assert sha256(tmp_path / "out") == undisturbed


def started(words: list[str], **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "chatbind_cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**environment(), **variables},
        text=True,
    )


def descendants(process: int) -> Iterator[int]:
    """A process and all below it, as a scheduler signals them."""
    yield process
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from descendants(int(child))


def end_after(step: int, process: subprocess.Popen[str], number: int) -> str:
    """Signals all of a run's processes once it has logged a step; returns what it said."""
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        for line in process.stdout:
            if json.loads(line).get("step") == step:
                break
        for one in list(descendants(process.pid)):
            os.kill(one, number)
        process.stdout.read()
        return process.stderr.read()


@pytest.mark.slow
def test_a_process_and_its_loader_are_both_signalled(world, tmp_path) -> None:
    words = ["pretrain", *world.args(tmp_path / "out", "--num-train-epochs", "1000")]
    process = started([*words, "--dataloader-num-workers", "1"])
    said = end_after(2, process, signal.SIGTERM).splitlines()
    assert process.returncode == 75, said
    assert said[-1].startswith("chatbind: told to stop after step")
    assert not [line for line in said if not line.startswith("chatbind: ")]


@pytest.mark.slow
def test_two_workers_stop_at_the_same_step_and_go_on(world, here, tmp_path) -> None:
    def words(output: Path, samples: int) -> list[str]:
        made = world.args(output, "--max-steps", "60", "--learning-rate", "0.01")
        made[made.index("-m") + 1] = str(world.llama_without_dropout)
        made[made.index("--per-device-train-batch-size") + 1] = str(samples)
        return made

    out = tmp_path / "out"
    launched = ["pretrain", *words(out, 1), "--num-processes", "2"]
    process = started(launched)
    said = end_after(2, process, signal.SIGUSR1).splitlines()
    assert process.returncode == 75, said
    assert said[-1].startswith("chatbind: told to stop after step")
    assert not [line for line in said if not line.startswith("chatbind: ")]
    (kept,) = out.glob("checkpoint-*")
    assert f"after step {kept.name.removeprefix('checkpoint-')} of 60" in said[-1]
    # one process is as good as two for going on, and for doing it all
    assert here("pretrain", *words(out, 2)).code == 0
    assert here("pretrain", *words(tmp_path / "one", 2)).code == 0
    one, two = (load_file(o / "projector.safetensors") for o in (tmp_path / "one", out))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4, msg=name)


@pytest.mark.slow
def test_what_is_ended_before_it_trains_leaves_nothing_behind(world, tmp_path) -> None:
    words = ["pretrain", *world.args(tmp_path / "out"), "--num-processes", "2"]
    with started(words, TMPDIR=str(tmp_path)) as process:
        # the workers have heard what they are to train on, and open the model
        wait_until(lambda: any(tmp_path.glob("chatbind-*/inputs.pickle")), process)
        process.terminate()
        assert process.wait() == -signal.SIGTERM
    assert not any(tmp_path.glob("chatbind-*"))

"""A step that is no number ends the run before it spoils anything; its samples are named."""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import count

import pytest
import torch
from transformers import TrainerControl, TrainerState

from chatbind_cli.data.conversations import Conversations
from chatbind_cli.errors import ChatBindError, Interrupted
from chatbind_cli.training.watch import Watch
from tests.training.conftest import caption

NAN = torch.tensor(math.nan)
FINE = torch.tensor(1.0)


def watch(*, scaled: bool = False, others: float = 0, told: float = 0) -> Watch:
    records = [({"id": f"c{i}", **caption(4)}, f"data.json:{i}") for i in range(4)]
    for record, _ in records[:1]:
        del record["id"]
    total = lambda found: found + torch.tensor([0.0, others, told])  # noqa: E731
    return Watch(Conversations(records), total, scaled=scaled)


def step(one: Watch, *losses: torch.Tensor, norm: object = FINE, stop: bool = False) -> None:
    one.begin([[0, 1], [2]])
    for loss in losses:
        one.saw(loss)
    one.check(norm, 7, stop=stop)  # type: ignore[arg-type]


def test_the_samples_of_the_batch_that_is_no_number_are_named() -> None:
    step(watch(), FINE, FINE)
    with pytest.raises(ChatBindError, match=r"the loss .* at step 7 \(its samples: data.json:2 "):
        step(watch(), FINE, NAN)
    with pytest.raises(ChatBindError, match=r"samples: data.json:0, data.json:1 \(id c4\)\);"):
        step(watch(), torch.tensor(math.inf), FINE)


@pytest.mark.parametrize("norm", [NAN, math.inf])
def test_a_gradient_that_is_no_number_names_the_whole_step(norm: object) -> None:
    with pytest.raises(ChatBindError, match=r"the gradient .*data.json:0, .*1 \(.*2 \(id c4\)\)"):
        step(watch(), FINE, FINE, norm=norm)
    step(watch(), FINE, FINE, norm=None)


def test_processes_agree_on_what_one_of_them_has_seen() -> None:
    with pytest.raises(ChatBindError, match="the gradient is not a number"):
        step(watch(others=1), FINE, FINE)


@pytest.mark.parametrize(("elsewhere", "here"), [(0.0, False), (1.0, False), (0.0, True)])
def test_all_stop_with_a_checkpoint_when_one_was_told(elsewhere: float, here: bool) -> None:
    one = watch(told=elsewhere)
    step(one, FINE, stop=here)
    state, control = TrainerState(global_step=7, max_steps=8), TrainerControl(should_evaluate=True)
    one.on_step_end(None, state, control)  # type: ignore[arg-type]
    told = here or elsewhere > 0
    assert control.should_save is control.should_log is told
    assert control.should_evaluate is not told
    with pytest.raises(Interrupted, match="after step 7 of 8,") if told else nullcontext():
        one.on_save(None, state, control)  # type: ignore[arg-type]


def test_after_the_last_step_the_result_is_written_all_the_same() -> None:
    one = watch(told=1)
    step(one, FINE)
    state, control = TrainerState(global_step=8, max_steps=8), TrainerControl()
    one.on_step_end(None, state, control)  # type: ignore[arg-type]
    one.on_save(None, state, control)  # type: ignore[arg-type]
    assert not control.should_log


def test_steps_that_a_scaler_leaves_out_are_an_error_only_in_a_row() -> None:
    one = watch(scaled=True)
    for _ in range(3):
        for _ in range(24):
            step(one, FINE, NAN, norm=math.inf)
        step(one, FINE, FINE)
    with pytest.raises(ChatBindError, match="of 25 steps in a row, up to step 7"):
        for _ in range(25):
            step(one, FINE, FINE, norm=math.inf)
    assert one.saw(NAN) == 0
    assert math.isnan(watch().saw(NAN))


@pytest.fixture
def spoil(monkeypatch):
    """Makes the loss of the batch of that number no number."""
    saw = Watch.saw

    def do(number: int) -> None:
        losses = count(1)

        def spoilt(self: Watch, loss: torch.Tensor) -> torch.Tensor:
            return saw(self, loss * math.nan if next(losses) == number else loss)

        monkeypatch.setattr(Watch, "saw", spoilt)

    return do


def test_a_run_stops_before_the_weights_are_spoilt_and_goes_on_after(
    world, here, tmp_path, spoil
) -> None:
    # the seventh batch belongs to step 4: nothing of it is logged before step 5
    words = ("--max-steps", "5", "--logging-steps", "5", "--save-steps", "1", "--seed", "3")
    # whose trial would be a forward pass, too
    args = world.args(tmp_path / "out", *words, "--share-prefix", "no")
    args[args.index("--gradient-accumulation-steps") + 1] = "2"
    spoil(7)
    done = here("pretrain", *args)
    assert done.code == 1
    line = done.stderr.splitlines()[-1]
    assert "the loss is not a number any more at step 4" in line
    assert line.count("captions.json") == 2  # of one micro batch
    kept = sorted(folder.name for folder in (tmp_path / "out").glob("checkpoint-*"))
    assert kept == ["checkpoint-3"]
    assert not (tmp_path / "out" / "projector.safetensors").exists()
    spoil(-1)
    again = here("pretrain", *args)
    assert again.code == 0, again.stderr
    assert "going on from step 3 of 5" in again.stderr

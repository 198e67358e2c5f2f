"""The Trainer's methods that ours replaces are still those that it was written against."""

from __future__ import annotations

import inspect

import pytest
from transformers import Trainer

from chatbind_cli.training.sharded_trainer import ShardedTrainer
from chatbind_cli.training.trainer import ChatBindTrainer

OURS = [*vars(ChatBindTrainer), *vars(ShardedTrainer)]
REPLACED = sorted({name for name in OURS if hasattr(Trainer, name) and name[:2] != "__"})


@pytest.mark.parametrize("name", REPLACED)
def test_a_replaced_method_takes_what_the_library_hands_it(name: str) -> None:
    theirs = inspect.signature(getattr(Trainer, name)).parameters
    ours = inspect.signature(getattr(ChatBindTrainer, name)).parameters
    if "args" in ours:
        assert list(theirs)[: len(ours) - 2] == list(ours)[:-2]
    else:
        assert list(theirs) == list(ours)


def test_the_private_ones_are_few_and_known() -> None:
    assert {name for name in REPLACED if name.startswith("_")} == {
        "_get_grad_norm",
        "_get_output_dir",
        "_load_from_checkpoint",
        "_load_optimizer_and_scheduler",
        "_move_model_to_device",
        "_save_checkpoint",
        "_save_optimizer_and_scheduler",
    }

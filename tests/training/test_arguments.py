"""Our settings in the Trainer's words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chatbind_cli.errors import UsageError
from chatbind_cli.training.arguments import attention, training_arguments
from chatbind_cli.training.data_files import DataFile
from chatbind_cli.training.settings import TrainingSettings

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.fixture
def settings(tmp_path: Path) -> TrainingSettings:
    return TrainingSettings(
        stage="finetune",
        model=tmp_path,
        data=(DataFile(tmp_path / "data.json"),),
        output=tmp_path / "out",
        device="cpu",
    )


def test_the_values_reach_the_trainer(
    settings: TrainingSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = training_arguments(
        replace(
            settings,
            learning_rate=3e-4,
            warmup_ratio=0.25,
            lr_scheduler_type="linear",
            gradient_accumulation_steps=7,
            gradient_checkpointing=True,
            weight_decay=0.1,
            seed=5,
        ),
    )
    assert arguments.learning_rate == 3e-4
    assert arguments.get_warmup_steps(100) == 25
    assert arguments.lr_scheduler_type == "linear"
    # a step is one batch to the Trainer, whatever its passes
    assert arguments.gradient_accumulation_steps == 1
    assert arguments.dataloader_num_workers == 0
    assert arguments.gradient_checkpointing
    assert arguments.weight_decay == 0.1
    assert arguments.seed == arguments.data_seed == 5
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("ratio", "steps"), [(0.0, 0), (0.03, 3), (1.0, 100)])
def test_the_warmup_ratio_is_a_share_of_all_steps(
    settings: TrainingSettings, ratio: float, steps: int
) -> None:
    arguments = training_arguments(replace(settings, warmup_ratio=ratio))
    assert arguments.get_warmup_steps(100) == steps


def test_bfloat16_works_on_a_cpu(settings: TrainingSettings) -> None:
    made = training_arguments(replace(settings, bf16=True))
    assert made.bf16
    assert made.device.type == "cpu"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tf32": True}, "--tf32 has no effect: it is a mode of NVIDIA GPUs"),
        ({"report_to": ("no_such_tracker",)}, "no_such_tracker is not installed"),
    ],
)
def test_what_has_no_effect_here_is_said(
    settings: TrainingSettings,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, object],
    told: str,
) -> None:
    training_arguments(replace(settings, **change))
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lr_scheduler_type": "wavy"}, "wavy"),
        ({"optim": "magic"}, "magic"),
        ({"fp16": True}, "--fp16 needs a GPU"),
        ({"device": "tpu"}, "'tpu' is no device"),
    ],
)
def test_what_nobody_knows_is_a_usage_error(
    settings: TrainingSettings, change: dict[str, object], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        training_arguments(replace(settings, **change))


def test_attention_follows_what_the_run_computes_in(settings: TrainingSettings) -> None:
    arguments = training_arguments(settings)
    assert attention(settings, arguments) == "sdpa"
    with pytest.raises(UsageError, match="flash_attention_2: it needs an NVIDIA GPU"):
        attention(replace(settings, attn_implementation="flash_attention_2"), arguments)


@needs_no_gpu
def test_a_gpu_that_is_not_there_is_a_usage_error(settings: TrainingSettings) -> None:
    with pytest.raises(UsageError, match="there is no cuda here"):
        training_arguments(replace(settings, device="cuda"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"learning_rate": float("nan")}, "--learning-rate is nan"),
        ({"bf16": True, "fp16": True}, "exclude each other"),
        ({"eval_strategy": "steps"}, "needs held-out conversations"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    settings: TrainingSettings, change: dict[str, object], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        replace(settings, **change)


def test_how_a_batch_is_split_is_no_part_of_a_runs_identity(settings: TrainingSettings) -> None:
    one = replace(settings, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    two = replace(settings, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert one.identity(1) == two.identity(2)
    assert one.identity(1) != two.identity(1)
    assert one.identity(1) == replace(two, global_batch_size=8).identity(3)
    assert one.identity(1) == replace(one, packing=True).identity(1)
    assert one.identity(1) != replace(one, group_by_length=True).identity(1)
    assert one.identity(1) == replace(one, save_steps=7, logging_steps=3).identity(1)
    assert one.identity(1) != replace(one, seed=9).identity(1)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ([], None),
        (["auto"], None),
        (["True"], True),
        (["no"], False),
        ([""], True),
    ],
)
def test_gradient_checkpointing_has_three_values_and_old_spellings(
    words: list[str], meant: bool | None
) -> None:
    import click
    from chatbind_cli.commands._training_options import compute_options

    @compute_options
    def parsed(**values: object) -> None: ...

    made = click.Command("x", params=parsed.__click_params__[::-1], callback=dict)
    line = ["--gradient-checkpointing", *filter(None, words)] if words else []
    assert made.main(line, standalone_mode=False)["gradient_checkpointing"] is meant

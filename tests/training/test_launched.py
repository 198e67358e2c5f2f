"""What accelerate's launcher was configured with means our own options."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.commands import launch as launcher
from accelerate.utils.launch import prepare_multi_gpu_env

from chatbind_cli.errors import UsageError
from chatbind_cli.training.launched import with_launcher
from chatbind_cli.training.settings import TrainingSettings

OLDER = {"fsdp_sharding_strategy": "SHARD_GRAD_OP", "fsdp_version": 1}
NEWER = {"fsdp_reshard_after_forward": "true", "fsdp_version": 2}


@pytest.fixture
def settings(tmp_path: Path) -> TrainingSettings:
    return TrainingSettings(stage="finetune", model=tmp_path, data=(), output=tmp_path)


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Puts into the environment what the launcher's own code makes of a configuration."""

    def put(fsdp: dict[str, object] | None = None, **fields: object) -> None:
        lines = [f"{name}: {value}" for name, value in fields.items()]
        if fsdp is not None:
            lines += ["distributed_type: FSDP", "fsdp_config:"]
            lines += [f"  {name}: {value}" for name, value in fsdp.items()]
        file = tmp_path / "mine.yaml"
        file.write_text("\n".join(["num_processes: 2", *lines]))
        words = ["--config_file", str(file), "-m", "x"]
        read, *_ = launcher._validate_launch_command(
            launcher.launch_command_parser().parse_args(words)
        )
        before = dict(os.environ)
        made = prepare_multi_gpu_env(read)
        for name in made.keys() - before.keys():
            monkeypatch.setenv(name, made[name])

    return put


@pytest.mark.parametrize(("fsdp", "words"), [(OLDER, "shard_grad_op"), (NEWER, "full_shard")])
def test_its_sharding_is_ours(settings, launched, fsdp, words) -> None:
    fsdp = {**fsdp, "fsdp_transformer_layer_cls_to_wrap": "A,B"}
    launched({**fsdp, "fsdp_activation_checkpointing": "true"}, mixed_precision="bf16")
    found = with_launcher(settings)
    assert found.fsdp == words
    assert found.fsdp_layers == ("A", "B")
    assert found.gradient_checkpointing is True
    assert found.bf16 is True
    # accelerate is not told a second time
    assert not [name for name in os.environ if "FSDP" in name]
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ


def test_a_plain_launch_changes_nothing(settings, launched) -> None:
    launched(distributed_type="MULTI_GPU", mixed_precision="'no'")
    assert with_launcher(replace(settings, fsdp="full_shard", bf16=True)) == replace(
        settings, fsdp="full_shard", bf16=True
    )


def test_the_same_said_twice_is_no_contradiction(settings, launched) -> None:
    launched(NEWER)
    assert with_launcher(replace(settings, fsdp="full_shard auto_wrap")).fsdp == "full_shard"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"fsdp": "shard_grad_op"}, "--fsdp is 'shard_grad_op'.* says 'full_shard'"),
        ({"fsdp_layers": ("B",)}, "--fsdp-transformer-layer-cls-to-wrap is 'B'.* says 'A'"),
        ({"bf16": False}, "--bf16 is no, and the launcher's configuration says yes"),
    ],
)
def test_a_contradiction_is_named(settings, launched, change, told) -> None:
    launched({**NEWER, "fsdp_transformer_layer_cls_to_wrap": "A"}, mixed_precision="bf16")
    with pytest.raises(UsageError, match=told):
        with_launcher(replace(settings, **change))


def test_offload_is_refused(settings, launched) -> None:
    launched({**NEWER, "fsdp_offload_params": "true"})
    with pytest.raises(UsageError, match="offload is not supported"):
        with_launcher(settings)


def test_a_strategy_without_a_word_is_refused(settings, launched) -> None:
    launched({**OLDER, "fsdp_sharding_strategy": "HYBRID_SHARD"})
    with pytest.raises(UsageError, match="HYBRID_SHARD"):
        with_launcher(settings)


def test_deepspeed_is_refused(settings, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match="DEEPSPEED, which is not supported"):
        with_launcher(settings)

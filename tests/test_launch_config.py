"""Which configuration accelerate's launcher reads, and which it is never given."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from accelerate.commands import launch as launcher
from accelerate.commands.config import config_args

from chatbind_cli import launch
from chatbind_cli.errors import UsageError
from chatbind_cli.launch_config import config_words
from chatbind_cli.plan import Dispatch

FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config: {fsdp_version: 2, fsdp_offload_params: true}
gpu_ids: '3'
machine_rank: 1
mixed_precision: bf16
num_processes: 8
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_users_default_is_not_read(tmp_path, monkeypatch, capsys, processes) -> None:
    default = tmp_path / "default_config.yaml"
    default.write_text(FSDP)
    for module in (launcher, config_args):
        monkeypatch.setattr(module, "default_config_file", str(default))
    for name in ("RANK", "LOCAL_RANK", "CHATBIND_STATUS_FOLDER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert launch.dispatch(["vqa"], Dispatch(num_processes=processes, dry_run=True))
    line = shlex.split(capsys.readouterr().out)
    words = line[line.index("accelerate.commands.launch") + 1 :]
    read, *_ = launcher._validate_launch_command(launcher.launch_command_parser().parse_args(words))
    assert not read.use_fsdp
    assert (read.machine_rank, read.gpu_ids, read.mixed_precision) == (0, "all", "no")
    assert read.num_processes == processes


def test_a_file_that_is_given_is_handed_on(tmp_path: Path) -> None:
    given = tmp_path / "mine.yaml"
    given.write_text(FSDP)
    assert config_words(given) == ["--config_file", str(given)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}", "DEEPSPEED"),
        ("distributed_type: TPU", "TPU"),
        ("compute_environment: AMAZON_SAGEMAKER\ndistributed_type: NO", "AMAZON_SAGEMAKER"),
        ("num_processes: 2", "no configuration"),
        ("nothing", "no configuration"),
        ("a: [", "mine.yaml: "),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path: Path, text, told) -> None:
    given = tmp_path / "mine.yaml"
    given.write_text(text)
    with pytest.raises(UsageError, match=told):
        config_words(given)

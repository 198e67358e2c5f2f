"""The original's two training commands, flag by flag as they stand there."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from chatbind_cli.cli import run
from chatbind_cli.model.loading import load_chatbind

PRETRAIN = """
    --model_name_or_path ./checkpoints/vicuna-7b
    --data_path /path/to/cc3m_595k.json
    --image_folder /path/to/cc3m_595k
    --vision_tower openai/clip-vit-large-patch14
    --tune_mm_mlp_adapter True
    --mm_vision_select_layer -2
    --mm_use_im_start_end
    --bf16 True
    --output_dir ./checkpoints/chatbind-7b-pretrain
    --num_train_epochs 1
    --per_device_train_batch_size 16
    --per_device_eval_batch_size 4
    --gradient_accumulation_steps 2
    --evaluation_strategy "no"
    --save_strategy "steps"
    --save_steps 2400
    --save_total_limit 1
    --learning_rate 2e-3
    --weight_decay 0.
    --warmup_ratio 0.03
    --lr_scheduler_type "cosine"
    --logging_steps 1
    --tf32 True
    --model_max_length 2048
    --gradient_checkpointing True
    --lazy_preprocess True
    --report_to wandb
"""

FINETUNE = """
    --model_name_or_path /path/to/vicuna-7b
    --data_path /path/to/llava_instruct_150k.json
    --image_folder /path/to/coco/train2014
    --vision_tower openai/clip-vit-large-patch14
    --pretrain_mm_mlp_adapter ./checkpoints/mm_projector/chatbind-7b-pretrain.bin
    --mm_vision_select_layer -2
    --mm_use_im_start_end True
    --bf16 True
    --output_dir ./checkpoints/chatbind-7b
    --num_train_epochs 3
    --per_device_train_batch_size 4
    --per_device_eval_batch_size 4
    --gradient_accumulation_steps 2
    --evaluation_strategy "no"
    --save_strategy "steps"
    --save_steps 5000
    --save_total_limit 3
    --learning_rate 2e-5
    --weight_decay 0.
    --warmup_ratio 0.03
    --lr_scheduler_type "cosine"
    --logging_steps 1
    --tf32 True
    --fsdp "full_shard auto_wrap"
    --fsdp_transformer_layer_cls_to_wrap 'LlamaDecoderLayer'
    --model_max_length 2048
    --gradient_checkpointing True
    --lazy_preprocess True
    --report_to wandb
"""


@pytest.fixture
def seed_folders(world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The seed's paths, on our small files; no option names an encoder, as in the seed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".checkpoints").mkdir()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "imagebind").symlink_to(world.imagebind)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return {
        "./checkpoints/vicuna-7b": str(world.llama),
        "/path/to/vicuna-7b": str(world.llama),
        "/path/to/cc3m_595k.json": str(world.captions),
        "/path/to/cc3m_595k": str(world.media),
        "/path/to/llava_instruct_150k.json": str(world.instructions),
        "/path/to/coco/train2014": str(world.media),
    }


def seed_words(text: str, paths: dict[str, str]) -> list[str]:
    return [paths.get(word, word) for word in shlex.split(text)]


def test_the_seeds_training_runs_from_end_to_end(seed_folders, capsys) -> None:
    assert run(["pretrain", *seed_words(PRETRAIN, seed_folders)]) == (0, "")
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    # 16 samples are half of the 32 of a step
    assert [record.get("step") for record in records] == [1, None]
    for flag in ("--vision-tower", "--mm-vision-select-layer", "--lazy-preprocess", "--tf32"):
        assert f"{flag} has no effect" in err

    # the seed's second step, as its `scripts/extract_mm_projector.py` takes it
    extract = (
        "extract-projector --model_name_or_path ./checkpoints/chatbind-7b-pretrain "
        "--output ./checkpoints/mm_projector/chatbind-7b-pretrain.bin"
    )
    assert run(shlex.split(extract)) == (0, "")
    capsys.readouterr()

    assert run(["finetune", *seed_words(FINETUNE, seed_folders)]) == (0, "")
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert [record.get("step") for record in records] == [1, 2, 3, 4, 5, 6, None]
    assert "--fsdp has no effect: there is one process" in err
    bundle = load_chatbind("checkpoints/chatbind-7b")
    assert bundle.config.use_start_end
    assert str(bundle.model.dtype) == "torch.bfloat16"


@pytest.mark.parametrize(("command", "text"), [("pretrain", PRETRAIN), ("finetune", FINETUNE)])
def test_the_seeds_command_lines_parse_on_four_processes(
    command: str, text: str, capsys, monkeypatch
) -> None:
    assert run([command, *shlex.split(text), "--num-processes", "4", "--dry-run"]) == (0, "")
    line = capsys.readouterr().out
    words = shlex.split(line)
    assert "accelerate.commands.launch" in words
    assert words[words.index("--num_processes") + 1] == "4"
    at = words.index("chatbind_cli")
    assert words[at + 1 :][: len(shlex.split(text))] == [command, *shlex.split(text)][:-1]


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_the_help_shows_what_people_set_and_help_all_the_rest(command: str, capsys) -> None:
    shown = {}
    for option in ("--help", "--help-all"):
        run([command, option])
        lines = capsys.readouterr().out.splitlines()
        shown[option] = [line for line in lines if line.startswith("  -")]
    assert len(shown["--help"]) <= 25
    assert len(shown["--help-all"]) > 55
    assert any("--attn-implementation" in line for line in shown["--help-all"])
    # the published hyper-parameters of the stage are its defaults
    rates = {"pretrain": "0.002", "finetune": "2e-05"}
    (rate,) = (line for line in lines if line.startswith("  --learning-rate"))
    assert f"[default: {rates[command]};" in rate

"""A published model at the command line: from base and delta to training that goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatbind_cli.cli import run
from chatbind_cli.model.loading import load_chatbind
from chatbind_cli.model.tokenizer import prepare_tokenizer

from .conftest import DIM


def chatbind(capsys: pytest.CaptureFixture[str], *words: Any) -> list[dict[str, Any]]:
    """Runs a command that must succeed; returns its records."""
    code, message = run([str(word) for word in words])
    assert code == 0, message
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def published(world, tmp_path: Path) -> Path:
    """The world's LLaMA, gone on with and published: `model_type` llava_image_bind_select."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(world.llama)
    tokenizer = AutoTokenizer.from_pretrained(world.llama)
    prepare_tokenizer(tokenizer, pad_token="[PAD]")
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tensors = {name: t + 0.01 * torch.randn(t.shape) for name, t in base.state_dict().items()}
    hidden = base.config.hidden_size
    tensors["model.mm_projector.weight"] = torch.randn(hidden, DIM)
    tensors["model.mm_projector.bias"] = torch.randn(hidden)
    folder = tmp_path / "published"
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")
    fields = base.config.to_dict() | {
        "model_type": "llava_image_bind_select",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_use_im_start_end": True,
        "mm_hidden_size": 1024,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    tokenizer.save_pretrained(folder)
    return folder


def test_delta_target_projector_training_and_answers(world, published, tmp_path, capsys):
    delta, target, projector = tmp_path / "delta", tmp_path / "target", tmp_path / "p.bin"
    chatbind(capsys, "make-delta", "--base", world.llama, "--target", published, "--delta", delta)
    chatbind(capsys, "apply-delta", "--base", world.llama, "--delta", delta, "--target", target)
    training = world.args(tmp_path / "on", "--max-steps", "2", source="media")[2:]
    training += ["--learning-rate", "1e-4"]
    training[training.index(str(world.captions))] = str(world.instructions)
    (*_, model) = chatbind(capsys, "finetune", "-m", target, *training)
    assert (model["artifact"], Path(model["path"])) == ("model", tmp_path / "on")
    before, after = load_chatbind(target), load_chatbind(tmp_path / "on")
    assert (before.config.stage, after.config.stage) == ("published", "finetune")
    assert after.config.prompt_style == before.config.prompt_style == "multimodal"
    assert after.config.normalize_embeddings is False
    old, new = (b.model.projector.state_dict()["layers.0.weight"] for b in (before, after))
    assert 0 < (new - old).abs().max() < 0.01

    chatbind(capsys, "extract-projector", target, "-o", projector)
    training[training.index(str(tmp_path / "on"))] = str(tmp_path / "anew")
    words = ["-m", world.llama, "--projector", projector]
    (*_, model) = chatbind(capsys, "finetune", *words, *training)
    picture = next(world.media.glob("*.png"))
    asking = ["--encoder", world.imagebind, "-a", picture, "--max-new-tokens", "2", "--json", "?"]
    for who in (["-m", target], ["-m", model["path"]], words):
        (answer,) = chatbind(capsys, "ask", *who, *asking)
        assert "text" in answer
    code, message = run(["ask", "-m", str(delta), *map(str, asking)])
    assert code == 1
    assert "is a delta, not a model" in message and "apply-delta" in message

"""A model without its language model: what is read of it, and that it is the same."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Gemma3TextConfig

from chatbind_cli.checkpoints.checkpoint import Checkpoint
from chatbind_cli.errors import CheckpointError
from chatbind_cli.inference.front import load_front
from chatbind_cli.inference.loaded_model import load_model
from chatbind_cli.model.assemble import build_chatbind
from chatbind_cli.model.config import EncoderInfo
from chatbind_cli.model.loading import load_chatbind
from chatbind_cli.model.probe import probe_embeddings
from tests.model import tiny

ENCODER = EncoderInfo(name="small", sha256="ab" * 32, embedding_dim=8, path="/enc")
GEMMA = (Gemma3TextConfig, {"num_key_value_heads": 2, "head_dim": 8})  # it scales its words


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "opt", "gpt2", "gemma3"])
def test_prompts_are_what_the_whole_model_makes_of_them(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(tiny.LANGUAGE_MODELS, "gemma3", GEMMA)
    base = tiny.save_language_model(tmp_path / "base", kind)
    tiny.save_chatbind(build_chatbind(base, encoder=ENCODER), tmp_path / "model")
    front = load_front(tmp_path / "model", dtype="float32")
    whole = load_chatbind(tmp_path / "model", dtype=torch.float32)
    with torch.inference_mode():
        here = probe_embeddings(front.bundle.model, front.bundle.tokenizer)
        there = probe_embeddings(whole.model, whole.tokenizer)
    torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-6)
    ends = whole.model.generation_config.eos_token_id
    assert front.bundle.model.generation_config.eos_token_id == ends
    assert front.bundle.config.to_dict() == whole.config.to_dict()


def test_nothing_is_read_but_words_and_projector(world, monkeypatch):
    read = []
    fill = Checkpoint.read_into

    def spy(self, name, start, out):
        read.append((name, out.numel()))
        fill(self, name, start, out)

    monkeypatch.setattr(Checkpoint, "read_into", spy)
    front = load_front(world.model, dtype="float32")
    table = front.bundle.model.get_input_embeddings().weight
    words = "language_model.model.embed_tokens.weight"
    # norms are what a delta is told by: as many numbers as one word has
    names = {name for name, _ in read if not name.endswith("norm.weight")}
    assert names == {words, "projector.layers.0.weight", "projector.layers.0.bias"}
    # once whole, and the rows of the media tokens
    assert sum(n for name, n in read if name == words) == table.numel() + 3 * table.shape[1]
    held = [n for n, p in front.bundle.model.named_parameters() if p.device.type != "meta"]
    assert names == set(held)


def test_words_stay_in_the_numbers_of_their_file(world, tmp_path):
    bundle = load_chatbind(world.model, dtype=torch.bfloat16)
    tiny.save_chatbind(bundle, tmp_path / "half")
    front = load_front(tmp_path / "half", dtype="float32")
    assert front.bundle.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert front.bundle.model.projector.dtype == torch.float32
    with torch.inference_mode():
        made = probe_embeddings(front.bundle.model, front.bundle.tokenizer)
    assert made.dtype == torch.float32


def test_what_else_is_known_of_the_model_is_known(world):
    front, whole = load_front(world.model), load_model(world.model)
    assert front.sha256 == whole.sha256
    assert front.model_id == whole.model_id
    assert front.encoder_sha256 == whole.encoder_sha256
    assert front.media_options() == whole.media_options()


def test_what_is_no_chatbind_model_is_refused(world, tmp_path):
    with pytest.raises(CheckpointError, match="is no ChatBind model"):
        load_front(world.llama)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_front(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="takes no --base"):
        load_front(world.model, base=world.llama)


def test_a_table_of_another_size_is_refused(world, tmp_path):
    bundle = load_chatbind(world.model)
    tiny.save_chatbind(bundle, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["vocab_size"] += 1
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has shape"):
        load_front(tmp_path / "model")

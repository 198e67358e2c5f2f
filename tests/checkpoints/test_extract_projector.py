import json

import pytest
import torch

from chatbind_cli.checkpoints.extract_projector import extract_projector
from chatbind_cli.checkpoints.projector_file import read_projector, write_projector
from chatbind_cli.errors import CheckpointError, WeightsError
from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration
from chatbind_cli.model.config import ChatBindConfig
from chatbind_cli.model.loading import projector_of

TEXT = {
    "model_type": "llama",
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TOKENS = {"<im_patch>": 17, "<im_start>": 18, "<im_end>": 19}
TOKENIZER_FILES = {
    "added_tokens.json": TOKENS,
    "tokenizer.json": {"added_tokens": [{"id": i, "content": t} for t, i in TOKENS.items()]},
    "tokenizer_config.json": {
        "added_tokens_decoder": {str(i): {"content": t} for t, i in TOKENS.items()}
    },
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ChatBindConfig(
        text_config=TEXT,
        embedding_dim=16,
        projector_type="mlp2x_gelu",
        tokens_per_embedding=2,
        im_patch_id=17,
        im_start_id=18,
        im_end_id=19,
        encoder={"name": "small", "sha256": "5" * 64},
    )
    return ChatBindForConditionalGeneration(config)


def same(a, b):
    assert a.info == b.info
    for found, wanted in ((a.tensors, b.tensors), (a.token_embeddings, b.token_embeddings)):
        assert set(found) == set(wanted)
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    return True


@pytest.mark.parametrize("shard", ["5GB", "1KB"])
def test_out_of_our_folder_comes_what_the_model_has(model, tmp_path, shard):
    model.save_pretrained(tmp_path / "m", max_shard_size=shard)
    projector, _ = extract_projector(tmp_path / "m", tmp_path / "p.safetensors")
    assert set(projector.token_embeddings) == {"im_patch", "im_start", "im_end"}
    assert same(read_projector(tmp_path / "p.safetensors"), projector_of(model))


def test_what_stage_1_leaves_goes_through_with_all_it_knows(model, tmp_path):
    (tmp_path / "run").mkdir()
    model.config.save_pretrained(tmp_path / "run")
    write_projector(tmp_path / "run/projector.safetensors", projector_of(model))
    extract_projector(tmp_path / "run", tmp_path / "p.safetensors")
    assert same(read_projector(tmp_path / "p.safetensors"), projector_of(model))


@pytest.mark.parametrize("layout", ["safetensors", "bin", "legacy"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tokenizer_file", TOKENIZER_FILES)
def test_published_layouts_give_their_projector_and_token_rows(
    make, tmp_path, layout, shards, tokenizer_file
):
    tensors = make.llama(0, projector=True)
    config = {"model_type": "llava_image_bind_select", "mm_use_im_start_end": True}
    folder = make("m", tensors, layout, shards, config)
    (folder / tokenizer_file).write_text(json.dumps(TOKENIZER_FILES[tokenizer_file]))
    extract_projector(folder, tmp_path / "p.safetensors")
    found = read_projector(tmp_path / "p.safetensors")
    assert torch.equal(
        found.tensors["projector.layers.0.weight"], tensors["model.mm_projector.weight"]
    )
    assert torch.equal(found.tensors["projector.layers.0.bias"], tensors["model.mm_projector.bias"])
    words = tensors["model.embed_tokens.weight"]
    assert torch.equal(found.token_embeddings["im_start"], words[18])
    assert torch.equal(found.token_embeddings["im_end"], words[19])
    assert found.info.normalize_embeddings is False
    assert found.info.use_start_end is True


def test_the_published_file_layout_is_what_old_scripts_load(make, tmp_path):
    tensors = make.llama(0, projector=True)
    folder = make("m", tensors, "bin", 2)
    extract_projector(folder, tmp_path / "p.bin")
    loaded = torch.load(tmp_path / "p.bin", weights_only=True)
    assert set(loaded) == {"model.mm_projector.weight", "model.mm_projector.bias"}
    assert torch.equal(loaded["model.mm_projector.weight"], tensors["model.mm_projector.weight"])


def test_only_the_few_tensors_are_read(make, tmp_path, monkeypatch):
    from chatbind_cli.checkpoints.checkpoint import Checkpoint

    folder = make("m", make.llama(0, projector=True), config={"model_type": "llava"})
    (folder / "added_tokens.json").write_text(json.dumps(TOKENS))
    read = []
    plain = Checkpoint.read_flat

    def counting(self, name, start, stop):
        read.append((name, stop - start))
        return plain(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "read_flat", counting)
    extract_projector(folder, tmp_path / "p.safetensors")
    assert sum(count for name, count in read if name == "model.embed_tokens.weight") == 3 * 8
    assert {name for name, _ in read} == {
        "model.mm_projector.weight",
        "model.mm_projector.bias",
        "model.embed_tokens.weight",
    }


def test_what_has_no_projector_says_so_and_leaves_nothing(make, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no projector; is it a language model"):
        extract_projector(make("m", make.llama(0)), tmp_path / "p.safetensors")
    assert not (tmp_path / "p.safetensors").exists()


def test_a_delta_is_refused(make, tmp_path):
    from chatbind_cli.checkpoints.make_delta import make_delta

    base, target = make("b", make.llama(0)), make("t", make.llama(1, projector=True))
    make_delta(base, target, tmp_path / "d")
    with pytest.raises(CheckpointError, match="apply it first"):
        extract_projector(tmp_path / "d", tmp_path / "p.safetensors")


def test_an_output_of_another_kind_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(CheckpointError, match=r"is .safetensors or .bin"):
        extract_projector(tmp_path / "nothing", tmp_path / "p.pt")


def test_a_broken_shard_is_named(make, tmp_path):
    folder = make("m", make.llama(0, projector=True), shards=3)
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"x" * 30)
    with pytest.raises(WeightsError, match="model-00002-of-00003"):
        extract_projector(folder, tmp_path / "p.safetensors")

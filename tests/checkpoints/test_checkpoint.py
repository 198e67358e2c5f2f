import json

import pytest
import torch

from chatbind_cli.checkpoints.checkpoint import open_checkpoint
from chatbind_cli.errors import CheckpointError, WeightsError


@pytest.mark.parametrize("layout", ["safetensors", "bin", "legacy"])
@pytest.mark.parametrize("shards", [1, 4])
def test_every_layout_reads_the_same(make, layout, shards):
    tensors = make.llama(0)
    folder = make("x", tensors, layout, shards)
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.read(name), tensor)
            assert torch.equal(torch.cat(list(checkpoint.chunks(name, 7))), tensor.view(-1))
        assert checkpoint.config["hidden_size"] == 8


def test_an_index_or_a_single_file_may_be_named(make):
    tensors = make.llama(0)
    sharded = make("sharded", tensors, shards=3)
    assert len(open_checkpoint(sharded / "model.safetensors.index.json").tensors) == len(tensors)
    assert len(open_checkpoint(make("one", tensors) / "model.safetensors").tensors) == len(tensors)


def test_safetensors_are_preferred_and_a_trainers_files_are_no_weights(make):
    folder = make("x", {"a": torch.zeros(1)})
    torch.save({"b": torch.zeros(1)}, folder / "pytorch_model.bin")
    assert list(open_checkpoint(folder).tensors) == ["a"]
    loose = make("y", {"a": torch.zeros(1)})
    (loose / "model.safetensors").rename(loose / "projector.safetensors")
    torch.save({"b": torch.zeros(1)}, loose / "training_args.bin")
    assert list(open_checkpoint(loose).tensors) == ["a"]


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/x", "..", "", 5])
def test_an_index_that_names_a_file_outside_is_refused(make, name):
    folder = make("x", make.llama(0))
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="outside its folder"):
        open_checkpoint(folder)


def test_shards_may_be_links_as_in_the_hubs_cache(make):
    folder = make("x", {"a": torch.ones(2)}, shards=1)
    blob = folder.parent / "blob"
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    assert open_checkpoint(folder).read("a").sum() == 2


def test_index_and_files_must_agree(make):
    folder = make("x", make.llama(0), shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="ghost.weight"):
        open_checkpoint(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"shard model-00002-of-00002.safetensors is missing"):
        open_checkpoint(folder)


def test_a_tensor_in_two_files_is_refused(make):
    folder = make("x", {"a": torch.zeros(1), "b": torch.zeros(1)}, shards=2)
    first, second = sorted(folder.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    index = {"weight_map": {"a": first.name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert list(open_checkpoint(folder).tensors) == ["a"]
    torch.save({"a": torch.zeros(1), "c": torch.zeros(1)}, second)
    index = {"weight_map": {"a": first.name, "c": second.name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="tensor a is in"):
        open_checkpoint(folder)


def test_a_folder_without_weights_says_what_was_expected(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no weights; expected model.safetensors"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(tmp_path / "nothing")


def test_a_tensor_that_is_not_there_is_named(make):
    checkpoint = open_checkpoint(make("x", {"a": torch.zeros(2, 2)}))
    with pytest.raises(WeightsError, match="has no tensor b"):
        checkpoint.read("b")

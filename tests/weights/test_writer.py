import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from chatbind_cli.errors import WeightsError
from chatbind_cli.weights.tensor_file import TensorInfo
from chatbind_cli.weights.writer import SafetensorsWriter, index_of, plan_shards, write_tensors

TENSORS = {
    "flag": torch.tensor([True, False, True]),
    "half": torch.arange(9).half(),
    "wide": torch.arange(4.0, dtype=torch.float64).view(2, 2),
    "bf16": torch.arange(3).bfloat16(),
    "empty": torch.zeros(0, 3),
    "turned": torch.arange(6.0).view(2, 3).T,
}


def test_the_library_reads_what_we_write(tmp_path):
    write_tensors(tmp_path / "x", TENSORS, {"made": "here"})
    read = load_file(tmp_path / "x")
    assert set(read) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt", "made": "here"}


def test_tensors_may_come_in_pieces(tmp_path):
    info = {"a": TensorInfo((10,), torch.float16)}
    with SafetensorsWriter(tmp_path / "x", info) as writer:
        for start in range(0, 10, 3):
            writer.append(torch.arange(start, min(start + 3, 10)).half())
    assert torch.equal(load_file(tmp_path / "x")["a"], torch.arange(10).half())


def test_a_byte_too_few_is_not_passed_over(tmp_path):
    with (
        pytest.raises(ValueError, match="18 bytes written, 20 in the header"),
        SafetensorsWriter(tmp_path / "x", {"a": TensorInfo((10,), torch.float16)}) as writer,
    ):
        writer.append(torch.arange(9).half())


def test_a_dtype_that_cannot_be_stored_is_named(tmp_path):
    with pytest.raises(WeightsError, match="tensor a has a dtype"):
        SafetensorsWriter(tmp_path / "x", {"a": TensorInfo((1,), torch.complex64)})


def test_shards_keep_the_order_and_their_size():
    infos = {f"t{i}": TensorInfo((size,), torch.uint8) for i, size in enumerate([4, 4, 9, 1, 3, 4])}
    shards = plan_shards(infos, 8)
    assert [shard.tensors for shard in shards] == [("t0", "t1"), ("t2",), ("t3", "t4", "t5")]
    assert shards[0].file == "model-00001-of-00003.safetensors"
    assert index_of(shards, infos)["metadata"] == {"total_size": 25}
    assert plan_shards(infos, 100)[0].file == "model.safetensors"

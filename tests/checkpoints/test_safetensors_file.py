import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from chatbind_cli.checkpoints.output_folder import index_of, plan_shards
from chatbind_cli.checkpoints.safetensors_file import SafetensorsWriter, TensorInfo
from chatbind_cli.errors import WeightsError

TENSORS = {
    "flag": torch.tensor([True, False, True]),
    "half": torch.arange(9).half(),
    "wide": torch.arange(4.0, dtype=torch.float64).view(2, 2),
    "bf16": torch.arange(3).bfloat16(),
    "empty": torch.zeros(0, 3),
    "turned": torch.arange(6.0).view(2, 3).T,
}


def test_the_library_reads_what_we_write(tmp_path):
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in TENSORS.items()}
    with SafetensorsWriter(tmp_path / "x", infos) as writer:
        for name in writer.order:
            writer.append(TENSORS[name])
    read = load_file(tmp_path / "x")
    assert set(read) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt"}


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
    assert sorted(shards.filename_to_tensors.values()) == [["t0", "t1"], ["t2"], ["t3", "t4", "t5"]]
    index = json.loads(index_of(shards))
    assert index["metadata"] == {"total_size": 25}
    assert set(index["weight_map"].values()) == {
        f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    }
    assert list(plan_shards(infos, 100).filename_to_tensors) == ["model.safetensors"]


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_full_disk_is_one_line(pieces):
    info = {"a": TensorInfo((pieces << 20,), torch.uint8)}
    with (
        pytest.raises(WeightsError, match=r"No space left on device.*goes on where it stopped"),
        SafetensorsWriter(Path("/dev/full"), info) as writer,
    ):
        for _ in range(pieces):
            writer.append(torch.zeros(1 << 20, dtype=torch.uint8))

import json
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatbind_cli.checkpoints.checkpoint import open_checkpoint
from chatbind_cli.errors import WeightsError

TENSORS = {
    "half": torch.arange(24).half().view(4, 6) / 7,
    "bf16": torch.arange(10).bfloat16(),
    "single": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "whole": torch.arange(-5, 5),
    "flag": torch.tensor([True, False, True]),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5),
    "turned": torch.arange(12.0).view(3, 4).T,
}


def write(path, kind):
    if kind == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_every_kind_of_file_gives_names_shapes_and_any_stretch_of_the_data(tmp_path, kind):
    file = open_checkpoint(write(tmp_path / "x", kind))
    assert {name: (info.shape, info.dtype) for name, info in file.tensors.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()
    }
    for name, tensor in TENSORS.items():
        flat = tensor.reshape(-1)
        for start, stop in [(0, len(flat)), (1, 3), (2, 2)]:
            if stop <= len(flat):
                piece = file.read_flat(name, start, stop)
                assert piece.dtype == tensor.dtype
                assert torch.equal(piece, flat[start:stop])
                file.close()


def test_what_is_read_does_not_change_the_file(tmp_path):
    file = open_checkpoint(write(tmp_path / "x", "zip"))
    file.read_flat("single", 0, 15).fill_(7)
    assert torch.equal(file.read_flat("single", 0, 15), TENSORS["single"].view(-1))


def test_a_state_dict_inside_a_training_checkpoint_is_found(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2)}, "step": 3}, tmp_path / "x")
    assert list(open_checkpoint(tmp_path / "x").tensors) == ["a"]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path, zipped):
    torch.save(
        {"a": Evil(tmp_path / "pwned")}, tmp_path / "x", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(WeightsError, match="could run code") as error:
        open_checkpoint(tmp_path / "x")
    assert not (tmp_path / "pwned").exists()
    assert "\n" not in str(error.value)


def test_a_bare_pickle_that_would_run_code_is_refused_too(tmp_path):
    (tmp_path / "x").write_bytes(pickle.dumps(Evil(tmp_path / "pwned"), protocol=2))
    with pytest.raises(WeightsError):
        open_checkpoint(tmp_path / "x")
    assert not (tmp_path / "pwned").exists()


def test_an_entry_that_is_no_tensor_is_named(tmp_path):
    torch.save({"a": torch.ones(1), "b": [1, 2]}, tmp_path / "x")
    with pytest.raises(WeightsError, match="entry 'b' is not a tensor but list"):
        open_checkpoint(tmp_path / "x")


def test_a_tensor_that_claims_more_than_its_file_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "x")
    with pytest.raises(WeightsError, match="tensor a claims"):
        open_checkpoint(tmp_path / "x")


def test_a_compressed_torch_file_is_refused(tmp_path):
    write(tmp_path / "x", "zip")
    with (
        zipfile.ZipFile(tmp_path / "x") as source,
        zipfile.ZipFile(tmp_path / "y", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for info in source.infolist():
            packed.writestr(info.filename, source.read(info))
    with pytest.raises(WeightsError, match="compressed"):
        open_checkpoint(tmp_path / "y")


def forged(path, change):
    """A safetensors file whose header has been tampered with."""
    save_file({"a": torch.zeros(4), "b": torch.zeros(4)}, path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["a"].update(data_offsets=[0, 1 << 40]),
        lambda header: header["a"].update(data_offsets=[16, 32]),
        lambda header: header["a"].update(data_offsets=[-16, 0]),
        lambda header: header["a"].update(shape=[1 << 40]),
        lambda header: header["a"].update(dtype="F99"),
        lambda header: header.pop("a"),
    ],
    ids=["past the end", "overlap", "before the start", "shape", "dtype", "hole"],
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, change):
    path = forged(tmp_path / "x", change)
    with pytest.raises(WeightsError, match="x: ") as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("part", [0.5, 0.95])
def test_a_file_that_is_cut_short_is_one_line(tmp_path, kind, part):
    path = write(tmp_path / "x", kind)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(WeightsError) as error:
        file = open_checkpoint(path)
        for name, info in file.tensors.items():
            file.read_flat(name, 0, info.numel)
    assert "\n" not in str(error.value)


def test_a_pointer_in_place_of_the_weights_is_told_apart(tmp_path):
    (tmp_path / "x").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n"
    )
    with pytest.raises(WeightsError, match=r"Git LFS pointer.*chatbind download"):
        open_checkpoint(tmp_path / "x")


def test_something_else_is_no_weights_file(tmp_path):
    (tmp_path / "x").write_text("hello")
    with pytest.raises(WeightsError, match="neither a safetensors nor a torch file"):
        open_checkpoint(tmp_path / "x")


def test_the_library_reads_what_we_read(tmp_path):
    path = write(tmp_path / "x", "safetensors")
    file = open_checkpoint(path)
    for name, tensor in load_file(path).items():
        assert torch.equal(file.read_flat(name, 0, tensor.numel()), tensor.view(-1))

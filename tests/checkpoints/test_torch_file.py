"""Forged torch files: each is one line, in seconds, and none crashes or calls anything."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from chatbind_cli.checkpoints.checkpoint import open_checkpoint
from chatbind_cli.errors import WeightsError

DEEP = b")" + b"\x85" * 200_000  # a tuple in a tuple in a tuple


def forged(path: Path, pickled: bytes, more: Mapping[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + pickled)
        archive.writestr("archive/data/0", bytes(64))
        for name, data in (more or {}).items():
            archive.writestr(name, data)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def tensor(
    *,
    key: str = "0",
    numel: int = 16,
    offset: int = 0,
    shape: Sequence[int] = (16,),
    strides: Sequence[int] = (1,),
) -> bytes:
    sizes, steps = (b"(" + b"".join(map(number, row)) + b"t" for row in (shape, strides))
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
    storage += number(numel) + b"tQ"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    word = b"ctorch._utils\n_rebuild_tensor_v2\n"
    return word + b"(" + storage + number(offset) + sizes + steps + hooks + b"tR"


def table(**tensors: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + data for name, data in tensors.items()) + b"u."


FORGED = {
    "deep key": (b"}" + DEEP + b"K\x01s.", "a key that is a tuple"),
    "deep value": (b"}" + text("a") + DEEP + b"s.", "entry 'a' is not a tensor but tuple"),
    "deep storage": (DEEP + b"Q.", "not a valid torch file"),
    "steps": (b"}" + b"K\x01" * (5 << 20) + b".", "not a valid torch file"),
    "long number": (
        b"\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b".",
        "not a valid torch file",
    ),
    "digits": (b"I" + b"9" * 5000 + b"\n.", "not a valid torch file"),
    "duplicates": (b"]" + b"2" * 999 + b".", "not a valid torch file"),
    "call of a number": (b"K\x01)R.", "a call of what is no function"),
    "deep pairs": (
        b"ccollections\nOrderedDict\n]" + DEEP + b"K\x01\x86a\x85R.",
        "not a valid torch file",
    ),
    "long call": (
        b"ctorch\nSize\nq\x00(" + b"N" * 10**6 + b"tq\x01" + b"h\x00h\x01R" * 10**6 + b".",
        "a call that no state dict makes",
    ),
    "long key": (
        b"}" + b"\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b"q\x00Ns"
        b"" + b"h\x00Ns" * 10**6 + b".",
        "a key that is a int",
    ),
    "function of torch": (b"ctorch\nload\n.", r"holds torch\.load, which is no tensor"),
    "name on the stack": (text("os") + text("system") + b"\x93.", r"holds os\.system"),
    "overflow": (table(w=tensor(shape=(2**62, 2**62), strides=(0, 0))), "claims more bytes"),
    "repeated": (table(w=tensor(shape=(10**9,), strides=(0,))), "claims more bytes"),
    "negative": (table(w=tensor(shape=(-1,))), "impossible shape"),
    "axes": (table(w=tensor(shape=(1,) * 99, strides=(1,) * 99)), "impossible shape"),
    "offset": (table(w=tensor(offset=2**61)), "reaches past the end"),
    "no storage": (table(w=tensor(key="9")), "not a valid torch file"),
    "terminal": (table(**{"\x1b[31m": tensor()}), "a tensor whose name is none"),
    "long name": (table(**{"x" * 2000: tensor()}), "a tensor whose name is none"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_pickle_is_one_line(name: str, tmp_path: Path) -> None:
    pickled, message = FORGED[name]
    with pytest.raises(WeightsError, match=message) as caught:
        open_checkpoint(forged(tmp_path / "x.pth", pickled))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_the_forger_here_makes_a_file_that_is_read(tmp_path: Path) -> None:
    path = forged(tmp_path / "x.pth", table(w=tensor(shape=(2, 8), strides=(8, 1))))
    assert open_checkpoint(path).read_flat("w", 0, 16).tolist() == [0.0] * 16


def test_what_is_built_onto_a_tensor_does_not_change_it(tmp_path: Path) -> None:
    """Python's unpickler would set attributes on our description after it was checked."""
    state = tensor() + b"}" + text("shape") + text("x") + b"sb"
    assert open_checkpoint(forged(tmp_path / "x.pth", table(w=state))).tensors["w"].shape == (16,)


def test_a_storage_that_many_tensors_share_is_refused(tmp_path: Path) -> None:
    """One megabyte that claims to be a gigabyte would make room for a model of that size."""
    more = {"archive/data/big": bytes(1 << 20)}
    one = tensor(key="big", numel=1 << 18, shape=(1 << 18,))
    path = forged(tmp_path / "x.pth", table(**{f"w{i}": one for i in range(999)}), more)
    with pytest.raises(WeightsError, match="share their numbers many times over"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["b/data.pkl", "other/x"])
def test_a_second_folder_in_the_archive_is_refused(name: str, tmp_path: Path) -> None:
    """torch would read that of the first record."""
    with pytest.raises(WeightsError, match="not a valid torch file"):
        open_checkpoint(forged(tmp_path / "x.pth", table(w=tensor()), {name: b"x"}))


def test_the_older_format_is_read_and_bounded_too(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"a": torch.arange(3.0)}, path, _use_new_zipfile_serialization=False)
    assert open_checkpoint(path).read_flat("a", 0, 3).tolist() == [0.0, 1.0, 2.0]
    path.write_bytes(b"\x80\x02" + DEEP + b".")
    with pytest.raises(WeightsError, match="not a valid torch file"):
        open_checkpoint(path)


def test_dtypes_without_a_storage_of_their_own_are_read(tmp_path: Path) -> None:
    made = {"a": torch.ones(3, 2).to(torch.float8_e4m3fn), "b": torch.ones(4).bfloat16()}
    torch.save(made, tmp_path / "x.pt")
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        found = {name: (info.shape, info.dtype) for name, info in checkpoint.tensors.items()}
        out = torch.empty(6, dtype=torch.float8_e4m3fn)
        checkpoint.read_into("a", 0, out)
    assert found == {name: (tuple(t.shape), t.dtype) for name, t in made.items()}
    assert (out.float() == 1).all()

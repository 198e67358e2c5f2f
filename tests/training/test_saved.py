"""What was saved is read again before it counts."""

from __future__ import annotations

import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint

from chatbind_cli.errors import WeightsError
from chatbind_cli.training import saved
from chatbind_cli.training.saved import check_optimizer, check_shards, check_weights


def weights() -> dict[str, torch.Tensor]:
    return {
        "projector.layers.0.weight": torch.ones(3, 2, dtype=torch.bfloat16),
        "bias": torch.zeros(4),
        "zero": torch.zeros(2, 2),
        "count": torch.arange(3),
    }


def test_good_weights_pass_by_pieces(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(saved, "_PIECE", 2)
    tensors = weights()
    save_file(tensors, tmp_path / "model.safetensors")
    check_weights(tmp_path, tensors)
    # tied weights are saved under one name
    check_weights(tmp_path / "model.safetensors", {**tensors, "tied": tensors["bias"]})
    # and some models save theirs under other names than they have in memory
    save_file({"split": torch.ones(2), "half": torch.ones(2)}, tmp_path / "other.safetensors")
    check_weights(tmp_path / "other.safetensors", {"whole": torch.ones(2, 2)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bias": torch.tensor([0.0, 0.0, 0.0, math.nan])}, "bias is not finite any more"),
        ({"bias": torch.tensor([-math.inf, 0.0, 0.0, 0.0])}, "bias is not finite any more"),
        ({"bias": torch.zeros(2, 2)}, r"bias was saved as \[2, 2\] in place of \[4\]"),
        ({"zero": torch.full((2, 2), math.inf)}, "zero is not finite any more"),
        ({"bias": None}, "holds 13 of 17 numbers"),
        ({"projector.layers.0.weight": torch.zeros(3, 2)}, "holds nothing but zeros"),
    ],
)
def test_bad_weights_do_not(tmp_path: Path, monkeypatch, change, says) -> None:
    monkeypatch.setattr(saved, "_PIECE", 2)
    written = {k: v for k, v in {**weights(), **change}.items() if v is not None}
    save_file(written, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=says):
        check_weights(tmp_path / "w.safetensors", weights())


def test_what_memory_has_lost_already_is_found_too(tmp_path: Path) -> None:
    nothing = {"projector.layers.0.weight": torch.zeros(0)}
    save_file(nothing, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="holds 0 of 0 numbers"):
        check_weights(tmp_path / "w.safetensors", nothing)
    save_file({"a": torch.zeros(2, 2)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="a holds nothing but zeros"):
        check_weights(tmp_path / "w.safetensors", {"a": torch.ones(2, 2)})
    zeros = {"projector.layers.0.weight": torch.zeros(2, 2)}
    save_file(zeros, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="nothing but zeros"):
        check_weights(tmp_path / "w.safetensors", zeros)


def test_an_optimizer_s_state_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "optimizer.pt"
    state = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(5)}}, "groups": [{}]}
    torch.save(state, path)
    check_optimizer(path)
    state["state"][0]["exp_avg"][4] = math.nan
    torch.save(state, path)
    with pytest.raises(WeightsError, match="the optimizer's state is not finite any more"):
        check_optimizer(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="cannot be read again"):
        check_optimizer(path)


def test_shards_are_read_by_who_wrote_them(tmp_path: Path) -> None:
    good, bad, cut = tmp_path / "good", tmp_path / "bad", tmp_path / "cut"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that one process saves them
        checkpoint.save({"weight": torch.ones(8), "rate": 0.1}, checkpoint_id=good)
        checkpoint.save({"weight": torch.tensor([1.0, math.nan])}, checkpoint_id=bad)
    check_shards(good, 0)
    check_shards(bad, 1)  # which has written nothing
    with pytest.raises(WeightsError, match="weight is not finite"):
        check_shards(bad, 0)
    shutil.copytree(good, cut)
    (part,) = cut.glob("*.distcp")
    part.write_bytes(part.read_bytes()[:-200])
    with pytest.raises(WeightsError, match="cannot be read again"):
        check_shards(cut, 0)

"""Models of timm as encoders, against timm's own transform and forward pass."""

from __future__ import annotations

import json
import pickle
import shutil
import time

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf

from chatbind_cli.encoders.encoder import load_media
from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.errors import ChatBindError, DownloadError, UsageError
from tests.download.conftest import hub_at, server  # noqa: F401  fixtures

from .tiny import close, edit_json, edit_tensors

SIZES = {"embed_dim": 16, "num_heads": 2, "depth": 1, "patch_size": 32}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder as timm saves it, and the model in it."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, **SIZES).eval()
    folder = tmp_path_factory.mktemp("timm") / "small"
    save_for_hf(model, folder, model_args=SIZES, safe_serialization=True)
    return folder, model


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "copy")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "a.png"
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(path)
    return path


def theirs(model, picture):
    """What timm makes of a picture."""
    model.reset_classifier(0)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        return model(transform(Image.open(picture))[None])[0]


def row(encoder, picture):
    return encoder.embed([load_media(encoder.read, picture)], normalize=False)[0]


def test_no_part_of_a_mapped_file_is_copied_with_timms_settings(made, picture, monkeypatch):
    """A copy of one tensor would be one of the whole file, which real weights end by."""

    def copied(storage, memo):
        raise AssertionError(f"{storage.nbytes()} bytes are copied")

    monkeypatch.setattr(torch.UntypedStorage, "__deepcopy__", copied)
    assert row(open_encoder(made[0]), picture).any()


def test_a_folder_gives_what_timm_gives(made, picture):
    folder, model = made
    encoder = open_encoder(folder)
    wanted = theirs(model, picture)
    assert close(row(encoder, picture), wanted)
    assert (encoder.modalities, encoder.embedding_dim) == (("image",), 16)
    assert (encoder.name, encoder.licence) == ("small", "apache-2.0")
    assert not any(parameter.requires_grad for parameter in encoder.tower("image").parameters())
    sent = pickle.loads(pickle.dumps(encoder.read))
    assert torch.equal(load_media(sent, picture).tensor, load_media(encoder.read, picture).tensor)
    half = open_encoder(folder, dtype=torch.bfloat16)
    assert torch.allclose(row(half, picture), wanted, atol=0.05 * wanted.abs().max())


def test_a_name_is_fetched_from_the_hub(server, made, picture, tmp_path, monkeypatch):  # noqa: F811
    """By the hub's own library, to its cache; without the hub, from there."""
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = timm.create_model("test_vit2", pretrained=False).eval()
    save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    saved = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    name = f"test_vit2.{model.pretrained_cfg['tag']}"
    with pytest.raises(DownloadError, match="no such repository"):
        open_encoder("timm:test_vit2")
    server.add_repo(f"timm/{name}", saved)
    encoder = open_encoder("timm:test_vit2")
    assert (encoder.reference, encoder.name) == (f"timm:{name}", name)
    assert close(row(encoder, picture), theirs(model, picture))
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", True)
    assert open_encoder(encoder.reference).sha256 == encoder.sha256


def test_a_name_that_timm_does_not_know_brings_others():
    for name, near in (("resnet19", "resnet18"), ("resnet18.nowhere", "resnet18.a1_in1k")):
        with pytest.raises(UsageError, match=f"timm has no '{name}'.*; for instance.* {near}"):
            open_encoder(f"timm:{name}")
    for name in ("hf-hub:owner/name", "gcvit_base", ""):
        with pytest.raises(UsageError, match="timm has no"):
            open_encoder(f"timm:{name}")


def args(**changes):
    return {"model_args": {**SIZES, **changes}}


def cfg(**changes):
    own = {"input_size": [3, 160, 160], "num_classes": 1000, "classifier": "head"}
    return {"pretrained_cfg": {**own, **changes}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "hf-hub:owner/name"}, "knows no architecture"),
        ({"architecture": "local-dir:/etc"}, "knows no architecture"),
        ({"architecture": 7}, "knows no architecture"),
        (args(depth=10**9), "asks for depth"),
        (args(embed_dim=65_536), "larger model than the weights"),
        (args(nonsense=1), "nonsense"),
        (cfg(input_size=[3, 10**6, 10**6]), "asks for input_size"),
        (cfg(input_size=[3, 100, 100]), "no model of timm that can be used"),
        (cfg(input_size="x"), "no model of timm that can be used"),
        (cfg(crop_pct=1e-9), "asks for crop_pct"),
        ({"pretrained_cfg": [1]}, "no JSON object"),
    ],
)
def test_a_config_that_is_none_is_one_line(folder, changes, said):
    edit_json(folder / "config.json", **changes)
    start = time.monotonic()
    with pytest.raises(ChatBindError, match=said):
        open_encoder(folder)
    assert time.monotonic() - start < 3


def test_nothing_of_a_folder_leads_elsewhere(folder, picture, tmp_path):
    before = row(open_encoder(folder), picture)
    torch.save({"cls_token": torch.zeros(1, 1, 16)}, tmp_path / "other.pt")
    other = str(tmp_path / "other.pt")
    elsewhere = {"url": "http://127.0.0.1:9/x", "file": other, "source": "local-dir"}
    said = json.loads((folder / "config.json").read_text())
    edit_json(
        folder / "config.json",
        pretrained_cfg={**said["pretrained_cfg"], **elsewhere, "custom_load": True},
        model_args={**said["model_args"], "checkpoint_path": other, "pretrained_cfg": "x"},
    )
    assert torch.equal(row(open_encoder(folder), picture), before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found.pop("pos_embed"), "1 tensors are missing, the first is pos_embed"),
        (lambda found: found["pos_embed"].fill_(torch.nan), "pos_embed holds NaN"),
        (lambda found: found.update(pos_embed=torch.ones(3)), "cannot be opened"),
    ],
)
def test_tensors_that_do_not_fit_are_told(folder, change, said):
    edit_tensors(folder, change)
    with pytest.raises(ChatBindError, match=said):
        open_encoder(folder).tower("image")

"""The files of a hub repository that an encoder is opened from, by the hub's own library."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chatbind_cli.download.encoder_folder import encoder_folder
from chatbind_cli.encoders.languagebind.config import (
    MODALITIES,
    find_repositories,
    is_languagebind,
)
from chatbind_cli.encoders.opening import open_encoder, open_encoders
from chatbind_cli.errors import DownloadError, UsageError
from tests.download.calling import chatbind
from tests.encoders.languagebind.repositories import save_repository

WEIGHTS = bytes(range(256)) * 8000
FILES = {
    "config.json": b"{}",
    "preprocessor_config.json": b"{}",
    "tokenizer.json": b"{}",
    "merges.txt": b"a b",
    "model.safetensors": WEIGHTS,
    "README.md": b"---\nlicense: mit\n---\n",
    "config_sentence_transformers.json": b"{}",
    "eval_results.json": b"no",
    "open_clip_model.safetensors": b"no",
    "pytorch_model.bin": b"no",
    "pytorch_model.bin.index.json": b"{}",
    "tf_model.h5": b"no",
    "flax_model.msgpack": b"no",
    "onnx/config.json": b"no",
    "onnx/model.onnx": b"no",
    "onnx/model.safetensors": b"no",
}
WANTED = {
    "README.md",
    "config_sentence_transformers.json",
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "merges.txt",
    "model.safetensors",
}


@pytest.fixture
def away(server, tmp_path, monkeypatch):
    """The hub's library talks to the server, and keeps its cache here; working folder: empty."""
    server.add_repo("owner/name", FILES)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return server


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_an_encoder_needs_goes_to_the_cache_and_is_found_there_offline(
    away, tmp_path, monkeypatch, capsys
):
    folder = encoder_folder("hf:owner/name")
    assert folder.is_relative_to(tmp_path / "cache")
    assert names(folder) == WANTED
    assert capsys.readouterr().err == (
        "chatbind: fetching hf:owner/name to the hub's cache: 7 files, 2.05 MB\n"
    )
    assert encoder_folder("hf:owner/name") == folder
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(away.requests)
    assert encoder_folder("hf:owner/name") == folder
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set") as error:
        encoder_folder("hf:owner/other")
    assert "\n" not in str(error.value)
    (folder / "model.safetensors").unlink()
    with pytest.raises(DownloadError, match="or not all of it"):
        encoder_folder("hf:owner/name")
    assert len(away.requests) == asked
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        (["pytorch_model.bin", "training_args.bin"], {"pytorch_model.bin"}),
        (["imagebind_huge.pth"], {"imagebind_huge.pth"}),
        (
            ["model-1-of-2.safetensors", "model-2-of-2.safetensors", "pytorch_model.bin"],
            {"model-1-of-2.safetensors", "model-2-of-2.safetensors"},
        ),
    ],
)
def test_one_form_of_the_weights_is_fetched(away, monkeypatch, weights, wanted):
    away.add_repo("owner/name", {"config.json": b"{}", **dict.fromkeys(weights, b"w")})
    assert names(encoder_folder("hf:owner/name")) == {"config.json", *wanted}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert names(encoder_folder("hf:owner/name")) == {"config.json", *wanted}


def test_what_download_has_put_here_is_taken_if_it_is_whole(away, tmp_path):
    assert chatbind("hf:owner/name").returncode == 0
    asked = len(away.requests)
    assert encoder_folder("hf:owner/name") == Path("name")
    assert encoder_folder(f"hf:owner/name@{'c' * 40}") == Path("name")
    assert len(away.requests) == asked
    # another revision, another owner, part of it, and somebody's folder of the name
    away.add_repo("other/name", FILES)
    for word in ("hf:owner/name@main", "hf:other/name"):
        assert encoder_folder(word).is_relative_to(tmp_path / "cache")
    Path("name/config.json").unlink()
    assert encoder_folder("hf:owner/name").is_relative_to(tmp_path / "cache")


def test_nothing_is_fetched_that_nobody_has_asked_for(away):
    with pytest.raises(DownloadError, match="not on this machine.*--encoder"):
        encoder_folder("hf:owner/name", fetch=False)
    assert not away.requests
    folder = encoder_folder("hf:owner/name")
    asked = len(away.requests)
    assert encoder_folder("hf:owner/name", fetch=False) == folder
    assert len(away.requests) == asked


def test_settings_alone_are_not_whole(away, tmp_path):
    assert chatbind("hf:owner/name", "--include", "*.json").returncode == 0
    assert encoder_folder("hf:owner/name").is_relative_to(tmp_path / "cache")


def test_what_cannot_be_had_is_one_line_without_the_token(away, fault, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    away.add_repo("owner/texts", {"config.json": b"{}", "a.onnx": b""})
    away.faults["/api/models/owner/private"] += [fault.status(401)]
    away.add_repo("owner/gated", FILES)
    away.gated.add("models/owner/gated")
    for word, message in (
        ("hf:owner/nobody", "there is no such repository"),
        ("hf:owner/private", "hf auth login"),
        ("hf:owner/gated", "ask on https://huggingface.co/owner/gated, then log in"),
        ("hf:owner/name@nowhere", "no revision 'nowhere'"),
        ("hf:owner/texts", "holds no weights of an encoder"),
    ):
        with pytest.raises(DownloadError, match=message) as error:
            encoder_folder(word)
        assert "\n" not in str(error.value) and "secret" not in str(error.value)
    assert "secret" in str(away.requests[0][2])
    for word in ("hf:owner/name/config.json", "hf:datasets/owner/name", "hf:name"):
        with pytest.raises(UsageError, match="hf:"):
            encoder_folder(word)


def test_languagebind_of_the_catalogue_is_five_repositories_that_are_one_encoder(
    away, golden, tmp_path
):
    published = golden / "languagebind_small" / "checkpoints"
    names_ = ("Image", "Video_FT", "Audio_FT", "Depth", "Thermal")
    for name in names_:
        config = (published / f"LanguageBind_{name}" / "config.json").read_bytes()
        files = {"config.json": config, "pytorch_model.bin": b"w", "merges.txt": b""}
        away.add_repo(f"LanguageBind/LanguageBind_{name}", files)
    done = chatbind("languagebind")
    assert done.returncode == 0, done.stderr
    folder = Path("checkpoints/languagebind")
    assert names(folder) >= {f"LanguageBind_{name}/pytorch_model.bin" for name in names_}
    assert is_languagebind(folder)
    assert list(find_repositories(folder)) == list(MODALITIES)
    asked = len(away.requests)
    record = json.loads(chatbind("--list", "languagebind").stdout)
    assert record["present"] and record["path"] == str(folder)
    assert encoder_folder("hf:LanguageBind/LanguageBind_Depth") == folder / "LanguageBind_Depth"
    assert len(away.requests) == asked
    (folder / "LanguageBind_Depth/config.json").unlink()
    assert json.loads(chatbind("--list", "languagebind").stdout)["files_present"] == 4
    again = chatbind("languagebind")
    fetched = [line for line in again.stdout.splitlines() if '"downloaded"' in line]
    assert len(fetched) == 1 and "LanguageBind_Depth/config.json" in fetched[0]


def test_an_encoder_of_the_hub_is_called_as_its_repository_alone_and_beside_another(away, tmp_path):
    for name, modality in (("eyes", "image"), ("ears", "audio")):
        save_repository(tmp_path / name, modality, dim=8)
    files = {path.name: path.read_bytes() for path in (tmp_path / "eyes").iterdir()}
    away.add_repo("owner/eyes", files)
    assert open_encoder("hf:owner/eyes").name == "owner/eyes"
    together = open_encoders(["hf:owner/eyes", tmp_path / "ears"])
    assert together.name == "owner/eyes+ears"


FETCH = "from chatbind_cli.download.encoder_folder import *; encoder_folder('hf:owner/name')"


def test_processes_that_start_together_fetch_once(server, fault, tmp_path):
    server.add_repo("owner/name", FILES)
    content = "/content/models/owner/name/model.safetensors"
    server.faults[content] += [fault.drip(100_000, 0.02)]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": server.url}
    started = [
        subprocess.Popen([sys.executable, "-c", FETCH], env=environment, cwd=tmp_path)
        for _ in range(2)
    ]
    assert [process.wait(60) for process in started] == [0, 0]
    assert len(server.gets(content)) == 1

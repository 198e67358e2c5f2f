"""Which encoder belongs to a model, where it is, and what a model's identity is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from chatbind_cli.device import resolve_device, resolve_dtype
from chatbind_cli.encoders.encoder import Encoder
from chatbind_cli.errors import CheckpointError, DownloadError, UsageError
from chatbind_cli.inference.loaded_model import load_model
from chatbind_cli.inference.media_encoder import MediaEncoder
from tests.inference.world import World, save_tiny_encoder


def moved(world: World, folder: Path, **encoder: object) -> Path:
    """A copy of the model whose config says something else about its encoder."""
    shutil.copytree(world.model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["encoder"] |= encoder
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def found(model: Path, path: Path | None = None, *, allow: bool = False) -> Encoder:
    how = {"encoders": [path] if path else [], "allow_encoder_mismatch": allow, "device": "cpu"}
    return load_model(model, **how).find_encoder()


def identity(model: Path, path: Path) -> dict[str, object]:
    return MediaEncoder(load_model(model, encoders=[path], device="cpu")).identity()


def test_the_config_says_where_the_encoder_is(world: World) -> None:
    assert found(world.model).reference.startswith(str(world.encoder))


def test_a_relative_path_starts_at_the_models_folder(world: World, tmp_path: Path) -> None:
    model = moved(world, tmp_path / "model", path="../encoder")
    shutil.copytree(world.encoder, tmp_path / "encoder")
    assert found(model).reference.startswith(str(tmp_path / "encoder"))


@pytest.mark.parametrize("path", [None, "/gone/imagebind"])
def test_a_missing_encoder_is_named_with_the_way_to_get_it(
    world: World, tmp_path: Path, path: str | None
) -> None:
    model = moved(world, tmp_path / "model", path=path, name="imagebind_huge")
    with pytest.raises(CheckpointError) as caught:
        found(model)
    text = str(caught.value)
    assert "the model needs the encoder imagebind_huge" in text
    assert "`chatbind download imagebind-huge`" in text
    assert "--encoder" in text
    assert "\n" not in text


@pytest.mark.parametrize("path", [None, "/gone/imagebind"])
def test_an_encoder_at_the_usual_place_is_found(
    world: World, tmp_path: Path, path: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = moved(world, tmp_path / "model", path=path)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world.encoder, tmp_path / "checkpoints" / "imagebind")
    assert found(model).reference == str(tmp_path / "checkpoints/imagebind")


def test_another_encoder_at_the_usual_place_is_not_taken_for_the_one_that_is_gone(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = moved(world, tmp_path / "model", path="/gone/tiny")
    monkeypatch.chdir(tmp_path)
    save_tiny_encoder(tmp_path / "checkpoints" / "imagebind", seed=9)
    with pytest.raises(CheckpointError, match="needs the encoder tiny, which is not at /gone/tiny"):
        found(model)
    assert found(model, allow=True).reference == str(tmp_path / "checkpoints/imagebind")


def test_what_a_model_names_is_not_fetched(world: World, tmp_path: Path) -> None:
    model = moved(world, tmp_path / "model", path="hf:chatbind/nowhere")
    with pytest.raises(DownloadError, match=r"hf:chatbind/nowhere.*for those alone who name it"):
        found(model)


def test_another_encoder_is_refused_unless_it_is_wanted(world: World, tmp_path: Path) -> None:
    save_tiny_encoder(tmp_path / "other", seed=9)
    with pytest.raises(CheckpointError, match=r"not with other .*--allow-encoder-mismatch"):
        found(world.model, tmp_path / "other")
    assert found(world.model, tmp_path / "other", allow=True).embedding_dim == 8


def test_the_identity_is_that_of_the_content(world: World, tmp_path: Path) -> None:
    first = load_model(world.model, device="cpu")
    model = moved(world, tmp_path / "same", path="elsewhere")
    assert load_model(model, device="cpu").sha256 == first.sha256
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert load_model(model, device="cpu").sha256 != first.sha256


def edited(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_every_file_that_changes_an_answer_changes_the_identity(
    world: World, tmp_path: Path
) -> None:
    seen = {load_model(world.model, device="cpu").sha256}
    changes: list[Callable[[Path], object]] = [
        lambda folder: edited(folder / "config.json", normalize_embeddings=False),
        lambda folder: edited(folder / "config.json", prompt_style="v0"),
        lambda folder: edited(folder / "config.json", media_options={"video_clips": 2}),
        lambda folder: edited(folder / "tokenizer_config.json", model_max_length=7),
        lambda folder: edited(folder / "generation_config.json", eos_token_id=[2, 5]),
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        lambda folder: (folder / "special_tokens_map.json").write_text("{}"),
        lambda folder: (folder / "merges.txt").write_text("a b"),
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
    ]
    for number, change in enumerate(changes):
        folder = shutil.copytree(world.model, tmp_path / str(number))
        loaded = load_model(folder, device="cpu")
        change(folder)
        seen.add(loaded.sha256)
    assert len(seen) == len(changes) + 1


def test_what_only_tells_of_a_models_origin_leaves_the_identity(
    world: World, tmp_path: Path
) -> None:
    folder = moved(world, tmp_path / "renamed", path="elsewhere", name="other")
    origin = {"_name_or_path": "x", "transformers_version": "9", "provenance": {"command": "x"}}
    edited(folder / "config.json", dtype="bfloat16", **origin)
    edited(folder / "generation_config.json", transformers_version="9", temperature=0.2)
    (folder / "README.md").write_text("changed")
    wanted = load_model(world.model, device="cpu").sha256
    assert load_model(folder, device="cpu").sha256 == wanted


def test_the_sizes_of_an_encoder_are_part_of_its_identity(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.encoder, tmp_path / "encoder")
    before = identity(world.model, tmp_path / "encoder")
    edited(tmp_path / "encoder" / "config.json", vision_num_heads=4)
    after = identity(world.model, tmp_path / "encoder")
    assert before.keys() == after.keys() == {"encoder_config_sha256"}
    assert before != after
    unpinned = moved(world, tmp_path / "model", sha256=None)
    assert "encoder_sha256" in identity(unpinned, world.encoder)
    assert identity(world.model, tmp_path / "nowhere") == {}


def test_a_language_model_with_a_projector_is_the_same_model(world: World) -> None:
    whole = load_model(world.model, device="cpu")
    parts = load_model(world.llama, projector=world.projector, device="cpu")
    assert parts.model_id == "llama+projector"
    ids = torch.tensor([[1, 5, 6, whole.bundle.config.im_patch_id, 7]])
    media = torch.randn(1, 8)
    logits = [loaded.bundle.model(ids, media_embeddings=media).logits for loaded in (whole, parts)]
    # a few units in the last place: the weights lie elsewhere in memory
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    assert parts.find_encoder().reference.startswith(str(world.encoder))


def test_media_options_are_those_of_training_but_for_what_the_user_says(world: World) -> None:
    loaded = load_model(world.model, device="cpu")
    loaded.bundle.config.media_options = {"clip_sampler": "chatbind", "of_next_year": 1}
    options = loaded.media_options(depth_unit="m")
    assert (options.clip_sampler, options.depth_unit) == ("chatbind", "m")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, world: World) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load_model(tmp_path / "nowhere", device="cpu")
    with pytest.raises(CheckpointError, match="nowhere"):
        load_model(tmp_path / "nowhere", projector=world.projector, device="cpu")


@pytest.mark.parametrize("name", ["warp", "cuda:999"])
def test_a_device_that_is_not_there_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError):
        resolve_device(name)


def test_numbers_are_wide_on_a_cpu_and_narrow_elsewhere() -> None:
    assert resolve_dtype("auto", torch.device("cpu")) is torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert resolve_dtype("float16", torch.device("cpu")) is torch.float16


def test_a_folder_of_stage_1_says_what_to_do_with_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "chatbind", "stage": "pretrain"}')
    (tmp_path / "projector.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no language model; give .*--projector"):
        load_model(tmp_path, device="cpu")

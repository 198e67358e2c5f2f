"""Repositories on disk: which a path means, what is refused, what is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatbind_cli.checkpoints.projector_file import ProjectorInfo
from chatbind_cli.encoders.encoder import Decoded, Encoder
from chatbind_cli.encoders.identity import identity_of
from chatbind_cli.encoders.imagebind.encoder import ImageBindEncoder
from chatbind_cli.encoders.languagebind.encoder import LanguageBindEncoder
from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.errors import CheckpointError, WeightsError
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import MediaSource
from chatbind_cli.model.config import check_encoder
from tests.encoders.languagebind.repositories import DIM, save_repository

PATCHES = "vision_model.embeddings.patch_embedding"
SHAPES = {"image": (3, 28, 28), "audio": (3, 28, 56), "video": (3, 4, 28, 28)}


def medium(modality: str, seed: int = 0) -> Decoded:
    noise = torch.randn(SHAPES[modality], generator=torch.Generator().manual_seed(seed))
    return Decoded(MediaSource("x", data=b"x"), modality, noise)


def lora(stem: str, *shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    names = (f"{stem}.lora_{part}.default.weight" for part in "AB")
    return {name: torch.ones(shape) for name, shape in zip(names, shapes, strict=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("side") / "languagebind"
    for modality in SHAPES:
        save_repository(folder / f"LanguageBind_{modality.title()}_FT", modality)
    return folder


def changed(repository: Path, target: Path, config: dict[str, Any], **tensors: Any) -> Path:
    """A copy with other settings of the vision tower, and other tensors (None: without it)."""
    shutil.copytree(repository, target)
    read = json.loads((target / "config.json").read_text())
    read["vision_config"] |= config
    (target / "config.json").write_text(json.dumps(read))
    state = load_file(target / "model.safetensors") | tensors
    save_file({k: v for k, v in state.items() if v is not None}, target / "model.safetensors")
    return target


def test_several_side_by_side_are_one_encoder(folder: Path) -> None:
    encoder = open_encoder(folder)
    assert isinstance(encoder, LanguageBindEncoder)
    assert (encoder.name, encoder.licence, encoder.embedding_dim) == ("languagebind", "MIT", DIM)
    assert encoder.modalities == ("image", "video", "audio", "text")
    assert not encoder.loaded
    for modality in SHAPES:
        alone = open_encoder(folder / f"LanguageBind_{modality.title()}_FT")
        row = alone.embed([medium(modality)], normalize=False)
        assert torch.equal(row, encoder.embed([medium(modality)], normalize=False))
        assert alone.sha256 != encoder.sha256


def test_only_the_towers_that_are_needed_are_read(folder: Path, tmp_path: Path) -> None:
    """The numbers of all others are lost."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for path in copy.glob("*/model.safetensors"):
        state = load_file(path)
        kept = "audio" if "Audio" in str(path) else "none"
        state = {
            name: value if kept == "audio" and "text" not in name else value * float("nan")
            for name, value in state.items()
            if value.is_floating_point()
        }
        save_file(state, path)
    encoder = open_encoder(copy)
    wanted = open_encoder(folder).embed([medium("audio")], normalize=True)
    assert torch.equal(encoder.embed([medium("audio")], normalize=True), wanted)
    assert list(encoder.loaded) == ["audio"]
    with pytest.raises(WeightsError, match="no tower for thermal, only for image, video"):
        encoder.tower("thermal")


def test_two_for_one_modality_or_of_two_widths_are_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("A_image", "B_image"):
        (tmp_path / name).symlink_to(folder / "LanguageBind_Image_FT")
    with pytest.raises(WeightsError, match="A_image and B_image are both for image"):
        open_encoder(tmp_path)
    (tmp_path / "B_image").unlink()
    save_repository(tmp_path / "Huge", "audio", dim=12)
    with pytest.raises(WeightsError, match="of width 8, Huge of width 12: another space"):
        open_encoder(tmp_path)


def test_the_identity_is_that_of_weights_and_settings(folder: Path, tmp_path: Path) -> None:
    image = folder / "LanguageBind_Image_FT"
    sha256 = open_encoder(image).sha256
    name = "vision_model.pre_layrnorm.bias"
    assert open_encoder(changed(image, tmp_path / "same", {})).sha256 == sha256
    other = changed(image, tmp_path / "weights", {}, **{name: torch.ones(16)})
    assert open_encoder(other).sha256 != sha256
    other = changed(image, tmp_path / "settings", {"hidden_act": "quick_gelu"})
    assert open_encoder(other).sha256 != sha256


def test_a_repository_that_comes_later_makes_no_other_encoder_of_it(
    folder: Path, tmp_path: Path
) -> None:
    names = ("LanguageBind_Image_FT", "LanguageBind_Audio_FT", "LanguageBind_Video_FT")
    for name in names[:2]:
        (tmp_path / name).symlink_to(folder / name)
    before = identity_of(open_encoder(tmp_path))
    trained = ProjectorInfo(
        projector_type="linear", embedding_dim=DIM, hidden_size=4, encoder=before.as_record()
    )
    (tmp_path / names[2]).symlink_to(folder / names[2])
    later = identity_of(open_encoder(tmp_path))
    assert later.sha256 != before.sha256
    check_encoder(trained, later)
    (tmp_path / names[0]).unlink()
    with pytest.raises(CheckpointError, match="was trained with the encoder"):
        check_encoder(trained, identity_of(open_encoder(tmp_path)))


def test_lora_is_the_same_merged_or_not_and_under_every_name(folder: Path, tmp_path: Path) -> None:
    image = folder / "LanguageBind_Image_FT"
    state = load_file(image / "model.safetensors")
    stem = "vision_model.encoder.layers.1.self_attn.v_proj"
    a, b = torch.randn(2, 16), torch.randn(16, 2)
    merged = {f"{stem}.weight": state[f"{stem}.weight"] + 16 / 2 * b @ a}
    plain = changed(image, tmp_path / "merged", {"lora_r": 2}, **merged)
    wanted = open_encoder(plain).embed([medium("image")], normalize=False)
    assert not torch.equal(wanted, open_encoder(image).embed([medium("image")], normalize=False))

    inside = {k: v for k, v in state.items() if k.startswith("vision_model.encoder.layers.")}
    for base in ("", "base_layer."):
        wrapped: dict[str, Any] = dict.fromkeys(inside)
        for name, value in inside.items():
            name = name.replace("encoder.", "encoder.base_model.model.")
            if "v_proj" in name:
                front, end = name.rsplit(".", 1)
                name = f"{front}.{base}{end}"
            wrapped[name] = value
        front = stem.replace("encoder.", "encoder.base_model.model.")
        wrapped[f"{front}.lora_A.default.weight"] = a
        wrapped[f"{front}.lora_B.default.weight"] = b
        there = changed(image, tmp_path / f"lora{base}", {"lora_r": 2, "lora_alpha": 16}, **wrapped)
        found = open_encoder(there).embed([medium("image")], normalize=False)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    with pytest.raises(WeightsError, match=r"lora_A.default.weight is \[2, 16\] in the file"):
        open_encoder(changed(there, tmp_path / "rank", {"lora_r": 4}))


def test_numbers_are_read_from_whatever_files_they_lie_in(folder: Path, tmp_path: Path) -> None:
    """Shards of torch, one of the old format, of half precision, of matrices saved turned."""
    image = folder / "LanguageBind_Image_FT"
    state = load_file(image / "model.safetensors")
    rounded = {k: v.half().to(v.dtype) for k, v in state.items()}
    whole = changed(image, tmp_path / "whole", {}, **rounded)
    wanted = open_encoder(whole).embed([medium("image")], normalize=False)
    shards = tmp_path / "shards"
    shards.mkdir()
    shutil.copy(image / "config.json", shards)
    halves: list[dict[str, torch.Tensor]] = [{}, {}]
    for number, (name, value) in enumerate(rounded.items()):
        small = value.half() if value.is_floating_point() else value
        halves[number % 2][name] = small.T.contiguous().T if small.ndim == 2 else small
    weight_map = {name: f"pytorch_model-{n}.bin" for n in (0, 1) for name in halves[n]}
    index = shards / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for n, half in enumerate(halves):
        new = n == 0
        torch.save(half, shards / f"pytorch_model-{n}.bin", _use_new_zipfile_serialization=new)
    found = open_encoder(shards).embed([medium("image")], normalize=False)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)  # memory lies otherwise


def test_weights_on_the_cpu_are_those_on_the_disk(folder: Path, tmp_path: Path) -> None:
    """Mapped, not copied: a change of the file is seen; and one of the tower stays its own."""
    image = changed(folder / "LanguageBind_Image_FT", tmp_path / "one", {})
    weights = open_encoder(image).tower("image").get_parameter("visual_projection.weight")
    path = image / "model.safetensors"
    data = path.read_bytes()
    at = data.find(weights.numpy().tobytes())
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\0" * 4)
    assert weights[0, 0] == 0
    weights[0, 1] = 7
    assert path.read_bytes()[at + 4 : at + 8] == data[at + 4 : at + 8]


def test_an_embedding_does_not_depend_on_what_else_is_embedded(folder: Path) -> None:
    encoder = open_encoder(folder)
    media = [medium(modality, seed) for seed in range(3) for modality in SHAPES]
    together = encoder.embed(media, normalize=False)
    alone = torch.cat([encoder.embed([one], normalize=False) for one in media])
    assert torch.equal(together, alone)
    half = open_encoder(folder, dtype=torch.bfloat16).embed(media, normalize=False)
    assert torch.cosine_similarity(half, together).min() > 0.98
    torch.testing.assert_close(half.norm(dim=1), together.norm(dim=1), rtol=1e-5, atol=0)


def test_without_the_vocabulary_there_is_no_text_tower(folder: Path, tmp_path: Path) -> None:
    small = save_repository(tmp_path / "both" / "Image", "image", vocab_size=96)
    assert open_encoder(small).modalities == ("image",)
    (tmp_path / "both" / "Audio").symlink_to(folder / "LanguageBind_Audio_FT")
    encoder = open_encoder(small.parent)
    assert encoder.modalities == ("image", "audio", "text")
    for attempt in (lambda one: one.tower("text"), lambda one: one.embed_texts(["a dog"])):
        with pytest.raises(WeightsError, match="no tower for text, only for image"):
            attempt(open_encoder(small))


def test_options_without_effect_are_said_and_do_not_tell_stores_apart(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = open_encoder(folder)
    asked = MediaOptions(clip_seconds=3.0, fps=1.0, start=2.0, depth_focal_px=600.0, max_pixels=9)
    assert encoder.heeded(asked) == MediaOptions(start=2.0, max_pixels=9)
    assert capsys.readouterr().err == (
        "chatbind: languagebind takes no notice of --clip-seconds, --fps, --depth-focal-px\n"
    )
    sensor = MediaOptions(depth_unit="disparity", depth_focal_px=600.0)
    assert encoder.heeded(sensor) == sensor
    assert ImageBindEncoder.heeds is Encoder.heeds  # every one of them, see FIELDS
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        ({"hidden_size": 1 << 40}, {}, "hidden_size is 1099511627776"),
        ({"hidden_size": "16"}, {}, "hidden_size is '16'"),
        ({"num_attention_heads": 3}, {}, "does not divide into 3 heads"),
        ({"num_attention_heads": 0}, {}, "has sizes of 0"),
        ({"num_hidden_layers": 900_000}, {}, "the config wants 900002 blocks"),
        ({"num_hidden_layers": 1}, {}, r"layers.1.layer_norm1.bias is \[16\] in the file and abs"),
        ({"add_time_attn": True}, {}, "is of image, and has frames in time"),
        ({"clip_type": "vl_newest"}, {}, "clip_type 'vl_newest' with tube_size 1 is not known"),
        ({"clip_type": "vl_new", "tube_size": 2}, {}, "clip_type 'vl_new' with tube_size 2"),
        ({"image_size": 5000, "patch_size": 1000}, {}, "reads 25,000,000 pixels in 25 patches"),
        ({"image_size": 100, "patch_size": 1}, {}, "reads 10,000 pixels in 10,000 patches"),
        ({"patch_size": 0}, {}, "patch_size is 0"),
        ({"hidden_act": "relu"}, {}, "hidden_act is 'relu'"),
        ({"image_size": 42}, {}, r"position_embedding.weight is \[5, 16\] in the file and \[10"),
        ({"audio_std": 0}, {}, "impossible numbers"),
        ({"lora_alpha": float("inf")}, {}, "lora_alpha is inf"),
        ({}, {"logit_scale": None}, "logit_scale is absent in the file"),
        ({}, {"logit_scale": torch.tensor(4)}, "logit_scale holds torch.int64"),
        (
            {"lora_r": 2},
            lora(PATCHES, (2, 3, 14, 14), (16, 2)),
            "patch_embedding.lora_A.* absent by",
        ),
        ({}, lora("visual_projection", (0, 16), (8, 0)), "visual_projection.lora_A.* absent by"),
        ({}, {"more": torch.ones(2)}, "more is .2. in the file and absent by the config"),
    ],
)
def test_what_does_not_fit_is_one_line(
    config: dict[str, Any], tensors: dict[str, Any], said: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=said) as caught:
        there = changed(folder / "LanguageBind_Image_FT", tmp_path / "odd", config, **tensors)
        open_encoder(there).tower("image")
    assert "\n" not in str(caught.value)


def test_weights_of_imagebind_are_still_imagebind_beside_repositories(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "Image").symlink_to(folder / "LanguageBind_Image_FT")
    (tmp_path / "imagebind_huge.pth").write_bytes(b"no weights")
    for path in (tmp_path, tmp_path / "imagebind_huge.pth"):
        with pytest.raises(WeightsError, match="imagebind_huge.pth: is neither"):
            open_encoder(path)
    assert isinstance(open_encoder(tmp_path / "Image"), Encoder)


def test_a_repository_that_cannot_be_told_is_not_passed_over(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "LanguageBind_Image").symlink_to(folder / "LanguageBind_Image_FT")
    (tmp_path / "LanguageBind_Audio").mkdir()
    (tmp_path / "LanguageBind_Audio/config.json").write_text('{"model_type": ')
    with pytest.raises(CheckpointError, match=r"LanguageBind_Audio/config\.json: cannot be read"):
        open_encoder(tmp_path)

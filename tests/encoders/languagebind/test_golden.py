"""What comes out, beside the reference's numbers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from chatbind_cli.encoders.encoder import Decoded, Encoder, load_media
from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import MediaSource

SIDE_BY_SIDE = ("Image", "Video_FT", "Audio_FT", "Depth", "Thermal")
HUGE = "LanguageBind_Video_Huge_V1.5_FT"
PICTURES = ("dog_image.jpg", "car_image.jpg", "bird_image.jpg")
REPOSITORIES = (*SIDE_BY_SIDE, "Audio", "Video", "Video_V1.5_FT")


@pytest.fixture(scope="module")
def encoder(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """Five repositories side by side."""
    folder = tmp_path_factory.mktemp("languagebind")
    for name in SIDE_BY_SIDE:
        name = f"LanguageBind_{name}"
        (folder / name).symlink_to(small / "checkpoints" / name)
    return open_encoder(folder)


def near(ours: torch.Tensor, wanted: torch.Tensor, share: float) -> bool:
    return bool((ours - wanted).abs().max() <= share * wanted.abs().max())


@pytest.mark.parametrize("name", REPOSITORIES)
def test_a_tower_gives_the_outputs_of_the_reference(name: str, small: Path) -> None:
    encoder = open_encoder(small / "checkpoints" / f"LanguageBind_{name}")
    modality = encoder.modalities[0]
    inputs = torch.from_numpy(np.load(small / "inputs.npz")[modality]).float()
    media = [Decoded(MediaSource("x", data=b"x"), modality, tensor) for tensor in inputs]
    outputs = load_file(small / "outputs.safetensors")
    for kind, normalize in (("scaled", False), ("normalized", True)):
        rows = encoder.embed(media, normalize=normalize)
        assert near(rows, outputs[f"LanguageBind_{name}.{kind}"], 1e-5)


def test_the_published_file_name_holds_the_same(small: Path, tmp_path: Path) -> None:
    there = small / "checkpoints" / "LanguageBind_Depth"
    (tmp_path / "config.json").symlink_to(there / "config.json")
    (tmp_path / "pytorch_model.bin").symlink_to(there / "pytorch_model.bin")
    depth = torch.from_numpy(np.load(small / "inputs.npz")["depth"][0]).float()
    medium = Decoded(MediaSource("x", data=b"x"), "depth", depth)
    rows = [open_encoder(p).embed([medium], normalize=False) for p in (there, tmp_path)]
    assert torch.equal(*rows)
    file = open_encoder(tmp_path / "pytorch_model.bin")
    assert torch.equal(file.embed([medium], normalize=False), rows[0])


def test_texts_and_their_ids_are_those_of_the_reference(encoder: Encoder, small: Path) -> None:
    texts = json.loads((small / "texts.json").read_text())["texts"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever open_clip's many imports warn about
        ids, rows = encoder.tokenize(texts), encoder.embed_texts(texts)
    assert torch.equal(ids, torch.from_numpy(np.load(small / "inputs.npz")["input_ids"]))
    assert near(rows, load_file(small / "outputs.safetensors")["language.normalized"], 1e-5)


@pytest.mark.parametrize(
    ("key", "modality", "files", "tolerance"),
    [
        ("images_dog_car_bird", "image", PICTURES, 1e-4),
        ("depth_max10", "depth", ("depth_a.png", "depth_b.png"), 1e-4),
        ("thermal", "thermal", ("thermal_a.png", "thermal_b.png"), 1e-4),
        ("video_decord", "video", ("video.mp4",), 1e-5),
        ("video_3frames_decord", "video", ("video_3frames.mp4",), 1e-5),
        ("audio_car", "audio", ("car_audio.wav",), 1e-3),
        ("audio_short_8k_1s", "audio", ("short_8k_1s.wav",), 1e-3),
    ],
)
def test_media_become_the_tensors_of_the_reference(
    key: str,
    modality: str,
    files: tuple[str, ...],
    tolerance: float,
    encoder: Encoder,
    small: Path,
    shared_data: Path,
) -> None:
    tensors = torch.stack([read(encoder, find(f, small, shared_data), modality) for f in files])
    summary = json.loads((small / "preprocess" / "summary_pin.json").read_text())["tensors"][key]
    assert list(tensors.shape)[-len(summary["shape"]) :] == summary["shape"]
    values = tensors.flatten()[torch.tensor(summary["indices"])]
    assert (values - torch.tensor(summary["values"])).abs().max() < tolerance
    assert abs(float(tensors.mean()) - summary["mean"]) < 1e-5
    assert abs(float(tensors.std(unbiased=False)) - summary["std"]) < 1e-5


def test_maps_of_eight_bits_are_those_of_the_reference_once_they_are_said_to_be_millimetres(
    encoder: Encoder, small: Path
) -> None:
    summary = json.loads((small / "preprocess" / "summary_pin.json").read_text())
    wanted = summary["edge_cases"]["depth gray_8bit.png"]
    options = MediaOptions(depth_unit="mm")
    found = load_media(encoder.read, small / "media" / "gray_8bit.png", "depth", options).tensor
    assert abs(float(found.mean()) - wanted["mean"]) < 1e-5
    assert abs(float(found.std(unbiased=False)) - wanted["std"]) < 1e-5


def test_windows_of_a_long_sound_are_its_start_middle_and_end(
    encoder: Encoder, small: Path
) -> None:
    ours = read(encoder, small / "media" / "long.wav", "audio")
    whole = torch.from_numpy(
        np.load(small / "preprocess" / "preprocess_pin.npz")["audio_long_full"]
    )
    starts = (0, (1098 - 1036) // 2, 1098 - 1036)
    for window, start in zip(ours, starts, strict=True):
        assert (window - whole[:, start : start + 1036].float()).abs().max() < 2e-3  # float16


def test_files_give_the_embeddings_of_the_reference(
    encoder: Encoder, small: Path, shared_data: Path
) -> None:
    wanted = load_file(small / "end_to_end_pin.safetensors")
    rows = json.loads((small / "end_to_end_rows.json").read_text())
    # the reference does not turn pictures upright, and draws windows of long sounds
    ours_differ = {"exif_rotated.jpg", "long.wav"}
    for modality, files in rows.items():
        media = [
            load_media(encoder.read, find(name, small, shared_data), modality) for name in files
        ]
        for kind, normalize in (("scaled", False), ("normalized", True)):
            made = encoder.embed(media, normalize=normalize)
            for name, ours, theirs in zip(files, made, wanted[f"{modality}.{kind}"], strict=True):
                assert near(ours, theirs, 1e-5) is (name not in ours_differ), name


def read(encoder: Encoder, path: Path, modality: str) -> torch.Tensor:
    return load_media(encoder.read, path, modality).tensor


def find(name: str, small: Path, shared_data: Path) -> Path:
    own = small / "media" / name
    return own if own.exists() else shared_data / "media" / name


@pytest.mark.parametrize("name", [*(f"LanguageBind_{name}" for name in REPOSITORIES), HUGE])
def test_published_sizes_fit(name: str, small: Path, tmp_path: Path) -> None:
    """Every key and shape of the full-size models, without their numbers."""
    full = json.loads((small / "full_size_keys.json").read_text())[name]
    header, end = {}, 0
    for key, told in full["keys"].items():
        for block in range(told.get("layers", 1)):
            size = int(np.prod(told["shape"])) * (8 if told.get("dtype") else 4)
            kind = "I64" if told.get("dtype") else "F32"
            place = {"dtype": kind, "shape": told["shape"], "data_offsets": [end, end + size]}
            header[key.replace("{i}", str(block))] = place
            end += size
    raw = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)  # no bytes on the disk
    parts = ("vision_config", "text_config", "projection_dim")
    kind = "LanguageBind" + name.split("_")[1]
    config = {"model_type": kind, **{part: full[part] for part in parts}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = open_encoder(tmp_path)
    assert encoder.embedding_dim == full["projection_dim"]
    assert "text" in encoder.modalities

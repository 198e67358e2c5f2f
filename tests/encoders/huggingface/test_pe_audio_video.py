"""PE-AV against transformers' own model and processors, on a tiny random repository."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, PeAudioVideoModel

from chatbind_cli.encoders.encoder import Encoder, load_media
from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.encoders.zero_shot import LabelScorer
from chatbind_cli.errors import ChatBindError
from chatbind_cli.media.audio import read_stretches
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import open_source
from tests.encoders.huggingface.audio_video import (
    HOP,
    RATE,
    SIDE,
    frames_of,
    noise,
    png,
    save_pe_audio_video,
    with_weights,
)
from tests.encoders.huggingface.tiny import close
from tests.recordings import Film, Sound

Repository = tuple[Path, PeAudioVideoModel]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[int | None, Repository]:
    """Repositories for any number of frames, and for four."""
    folders = {frames: tmp_path_factory.mktemp("pe-av") for frames in (None, 4)}
    return {frames: (at, save_pe_audio_video(at, frames)) for frames, at in folders.items()}


@pytest.fixture(scope="module")
def repository(kinds: dict[int | None, Repository]) -> Repository:
    return kinds[4]


@pytest.fixture(scope="module")
def encoder(repository: Repository) -> Encoder:
    return open_encoder(repository[0])


def own_films(model: PeAudioVideoModel, folder: Path, film: np.ndarray) -> torch.Tensor:
    """The embedding of a film, [frames, height, width, 3], which the model gives beside sound."""
    processor = AutoProcessor.from_pretrained(folder).video_processor
    pixels = processor([film], return_tensors="pt")["pixel_values_videos"]
    with torch.inference_mode():
        found = model(input_values=torch.zeros(1, 1, HOP), pixel_values_videos=pixels)
    rows: torch.Tensor = found.video_embeds
    return rows


@pytest.mark.parametrize(
    ("samples", "rate", "channels"),
    [(1, RATE, 1), (HOP, RATE, 1), (5 * HOP + 7, RATE, 2), (9000, 44_100, 2), (3 * RATE, RATE, 1)],
)
def test_sounds_have_the_models_own_embeddings(
    repository: Repository, encoder: Encoder, sound: Sound, samples: int, rate: int, channels: int
) -> None:
    folder, model = repository
    wave = np.sin(np.arange(samples) ** 1.1 / 20) / 2
    data = sound(samples=wave, rate=rate, channels=channels)
    read = read_stretches(open_source(data), RATE, lambda total: [(0, total)], longest_s=9)[0]
    extractor = AutoProcessor.from_pretrained(folder).feature_extractor
    inputs = extractor([read.numpy()], sampling_rate=RATE, return_tensors="pt")
    with torch.inference_mode():
        wanted = model.get_audio_embeds(**inputs)
    assert close(encoder.embed([load_media(encoder.read, data)], normalize=False), wanted)


@pytest.mark.parametrize("frames", [None, 4])
@pytest.mark.parametrize(("count", "size"), [(1, (64, 48)), (3, (34, 90)), (11, (64, 48))])
def test_films_have_the_models_own_embeddings(
    kinds: dict[int | None, Repository],
    film: Film,
    frames: int | None,
    count: int,
    size: tuple[int, int],
) -> None:
    folder, model = kinds[frames]
    encoder = open_encoder(folder)
    data = film(frames=count, size=size, draw=lambda n: noise(n, size))
    medium = load_media(encoder.read, data)
    assert len(medium.tensor) == (frames or count)
    wanted = own_films(model, folder, frames_of(data))
    assert close(encoder.embed([medium], normalize=False), wanted)


@pytest.mark.parametrize("frames", [None, 4])
def test_a_picture_is_a_film_of_one_frame(
    kinds: dict[int | None, Repository], frames: int | None
) -> None:
    folder, model = kinds[frames]
    encoder = open_encoder(folder)
    picture = noise(1, (50, 37))
    medium = load_media(encoder.read, png(picture))
    assert medium.tensor.shape == (3, SIDE, SIDE)
    wanted = own_films(model, folder, picture[None])
    assert close(encoder.embed([medium], normalize=False), wanted)


@pytest.mark.parametrize("modality", ["audio", "video"])
def test_texts_give_the_models_own_logits(
    repository: Repository, encoder: Encoder, modality: str
) -> None:
    folder, model = repository
    texts = ["a dog", "the red car sings", "", "a bird " * 40]
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    model.requires_grad_(False)
    ids = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.inference_mode():
        found = model(
            **ids,
            input_values=torch.rand(4, 1, 4 * HOP),
            pixel_values_videos=torch.rand(4, 4, 3, SIDE, SIDE),
        )
    side = model.get_submodule(f"{modality}_model")
    logits = found[f"logits_{modality}_text"][0] - side.get_parameter(f"text_{modality}_logit_bias")
    rows = encoder.embed_texts(texts, modality)
    assert close(encoder.compare(found[f"{modality}_embeds"][0], rows), logits)
    scorer = LabelScorer(encoder, texts, "{label}")
    scored = scorer.score(found[f"{modality}_embeds"][0], 1, modality)[0]
    assert scored["label"] == texts[int(logits.argmax())]
    assert scored["probability"] == pytest.approx(logits.softmax(dim=0).max().item(), rel=1e-4)
    together = encoder.run("text", encoder.tokenize(texts))
    assert close(together, encoder.embed_texts(texts))


def test_a_tower_is_read_without_the_others(
    repository: Repository, encoder: Encoder, tmp_path: Path, sound: Sound, film: Film
) -> None:
    heard, seen = load_media(encoder.read, sound()), load_media(encoder.read, film())
    weights = load_file(repository[0] / "model.safetensors")
    for modality, make in {
        "audio": lambda one: one.embed([heard], normalize=False),
        "video": lambda one: one.embed([seen], normalize=False),
        "text": lambda one: one.embed_texts(["a dog"], "audio"),
    }.items():
        mine = {"text": ("text_model", "audio_model.text", "video_model.text")}
        kept = mine.get(modality, (f"{modality}_model.{modality}",))
        part = {name: value for name, value in weights.items() if name.startswith(kept)}
        assert len(part) < 0.7 * len(weights)
        alone = with_weights(repository[0], tmp_path / modality, part)
        assert close(make(open_encoder(alone)), make(encoder))
        part.popitem()
        less = with_weights(repository[0], tmp_path / f"less-{modality}", part)
        with pytest.raises(ChatBindError, match="missing|is absent in the file"):
            make(open_encoder(less))


def test_a_tower_is_found_wherever_the_file_names_it(
    repository: Repository, encoder: Encoder, tmp_path: Path, sound: Sound
) -> None:
    moved = {
        "audio_model.audio_encoder.": "audio_video_encoder.embedder.audio_encoder.",
        "text_model.": "video_model.text_model.",
    }
    weights = load_file(repository[0] / "model.safetensors")
    for old, new in moved.items():
        for name in [name for name in weights if name.startswith(old)]:
            weights[new + name.removeprefix(old)] = weights.pop(name)
    other = open_encoder(with_weights(repository[0], tmp_path / "moved", weights))
    heard = load_media(encoder.read, sound())
    rows = [one.embed([heard], normalize=False) for one in (other, encoder)]
    assert close(*rows)
    assert close(*(one.embed_texts(["a dog"]) for one in (other, encoder)))


@pytest.mark.parametrize(
    ("at", "changes", "said"),
    [
        ("video_processor", {"num_frames": 10**6}, "asks for num_frames = 1e.06"),
        ("video_processor", {"num_frames": 2000, "size": {"height": 512, "width": 32}}, "512 x 32"),
        ("video_processor", {"do_resize": False}, "asks for 4 frames"),
        ("video_processor", {"size": {"shortest_edge": 32}}, "no usable processor"),
        ("feature_extractor", {"hop_length": 0}, "steps of 0"),
        ("feature_extractor", {"feature_size": 2}, "asks for 2 channels"),
        ("vision_config", {"architecture": "hf-hub:some/where"}, "is not PE's"),
        ("vision_config", {"model_args": {"checkpoint_path": "/etc/passwd"}}, "is not PE's"),
        ("vision_config", {"model_args": {"depth": 10**9}}, "asks for depth"),
        ("vision_config", {"num_classes": 10**9}, "asks for num_classes"),
    ],
)
def test_what_would_fill_memory_or_lead_elsewhere_is_refused_at_opening(
    repository: Repository, tmp_path: Path, at: str, changes: Any, said: str
) -> None:
    shutil.copytree(repository[0], tmp_path, dirs_exist_ok=True)
    file = tmp_path / ("config.json" if at == "vision_config" else "processor_config.json")
    fields = json.loads(file.read_text())
    inner = fields.get(at) or fields["audio_video_config"]["video_config"][at]
    inner.update(changes)
    file.write_text(json.dumps(fields))
    with pytest.raises(ChatBindError, match=said):
        open_encoder(tmp_path)


def test_a_processor_for_another_size_is_told(repository: Repository, tmp_path: Path) -> None:
    shutil.copytree(repository[0], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "processor_config.json"
    file.write_text(file.read_text().replace(f'"height": {SIDE}', f'"height": {SIDE + 1}'))
    with pytest.raises(ChatBindError, match=r"frames of \[33, 32\] in its processor"):
        open_encoder(tmp_path).tower("image")


def test_a_part_of_a_recording_and_its_beginning(
    kinds: dict[int | None, Repository], film: Film, sound: Sound
) -> None:
    any_number, four = (open_encoder(kinds[frames][0]) for frames in (None, 4))
    data = film(frames=100, draw=lambda n: noise(n, (64, 48)), gop=1, qp="0")
    half = MediaOptions(start=5.0)
    for encoder, wanted in ((any_number, 64), (four, 4)):
        assert len(load_media(encoder.read, data).tensor) == wanted
        part = load_media(encoder.read, data, options=half).tensor
        assert torch.equal(part[-1], load_media(encoder.read, data).tensor[-1])
    assert len(load_media(any_number.read, data, options=half).tensor) == 50
    assert len(load_media(any_number.read, data, options=MediaOptions(fps=2)).tensor) == 20
    heeded = [set(one.heeds("video", half)) for one in (any_number, four)]
    assert heeded == [{"fps", "start", "end"}, {"start", "end"}]
    wave = np.sin(np.arange(40 * RATE) ** 1.1 / 20) / 2
    later = MediaOptions(start=5)
    heard = load_media(four.read, sound(samples=wave, rate=RATE), options=later)
    first = load_media(four.read, sound(samples=wave[5 * RATE : 35 * RATE], rate=RATE))
    assert heard.tensor.shape == (1, 30 * RATE)
    assert torch.equal(heard.tensor, first.tensor)
    assert four.clips(heard) == 15

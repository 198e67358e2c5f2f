"""EmbeddingGemma 2 against transformers' own model and processor, on a tiny random repository."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, PreTrainedModel
from transformers.video_utils import VideoMetadata

from chatbind_cli.encoders.encoder import Encoder, load_media
from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.errors import ChatBindError, WeightsError
from chatbind_cli.media.audio import read_stretches
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import open_source
from tests.encoders.huggingface.audio_video import (
    PROMPTS,
    frames_of,
    noise,
    png,
    save_embedding_gemma2,
    with_weights,
)
from tests.encoders.huggingface.tiny import close, edit_json
from tests.recordings import Film, Sound

pytest.importorskip("transformers.models.embedding_gemma2", reason="needs transformers 5.18")

Repository = tuple[Path, PreTrainedModel]
_RATE = 16_000


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    folder = tmp_path_factory.mktemp("gemma")
    return folder, save_embedding_gemma2(folder)


@pytest.fixture(scope="module")
def encoder(repository: Repository) -> Encoder:
    return open_encoder(repository[0])


def own(repository: Repository, **media: Any) -> torch.Tensor:
    """What the model makes of media alone, its places averaged and scaled to length 1."""
    folder, model = repository
    inputs = AutoProcessor.from_pretrained(folder)(**media, return_tensors="pt")
    with torch.inference_mode():
        places = model(**inputs).last_hidden_state
    return torch.nn.functional.normalize(places.mean(dim=1), dim=-1)


@pytest.mark.parametrize("size", [(50, 37), (64, 64), (8, 300), (400, 5), (2, 2)])
def test_pictures_have_the_models_own_embeddings(
    repository: Repository, encoder: Encoder, size: tuple[int, int]
) -> None:
    picture = noise(1, size)
    medium = load_media(encoder.read, png(picture))
    wanted = own(repository, images=[picture])
    assert close(encoder.embed([medium], normalize=False), wanted)


@pytest.mark.parametrize(
    ("samples", "rate", "channels"),
    [(161, _RATE, 1), (1120, _RATE, 2), (9000, 44_100, 2), (8000, 8000, 1), (33_333, _RATE, 1)],
)
def test_sounds_have_the_models_own_embeddings(
    repository: Repository, encoder: Encoder, sound: Sound, samples: int, rate: int, channels: int
) -> None:
    wave = np.sin(np.arange(samples) ** 1.1 / 20) / 2
    data = sound(samples=wave, rate=rate, channels=channels)
    read = read_stretches(open_source(data), _RATE, lambda total: [(0, total)], longest_s=9)[0]
    wanted = own(repository, audio=[read.numpy()])
    assert close(encoder.embed([load_media(encoder.read, data)], normalize=False), wanted)


@pytest.mark.parametrize(
    ("kind", "count", "rate", "size"),
    [
        (("mp4", "libx264"), 1, 10, (64, 48)),
        (("mp4", "libx264"), 25, 10, (34, 90)),
        (("mp4", "libx264"), 70, 2, (64, 48)),
        (("webm", "libvpx"), 48, 24, (64, 48)),  # 1.999 s, in whole milliseconds
    ],
)
def test_films_have_the_models_own_embeddings(
    repository: Repository,
    encoder: Encoder,
    film: Film,
    kind: tuple[str, str],
    count: int,
    rate: int,
    size: tuple[int, int],
) -> None:
    data = film(*kind, frames=count, rate=rate, size=size, draw=lambda n: noise(n, size))
    medium = load_media(encoder.read, data)
    frames = frames_of(data)
    assert len(medium.tensor) == min(max(count // rate, 1), 32)
    told = VideoMetadata(total_num_frames=count, fps=rate, duration=count / rate)
    wanted = own(repository, videos=[frames], video_metadata=[told])
    assert close(encoder.embed([medium], normalize=False), wanted)


def test_texts_have_the_models_own_embeddings_behind_the_prompt(
    repository: Repository, encoder: Encoder
) -> None:
    texts = ["a dog", "the red car sings", "", "a bird " * 40]
    rows = encoder.embed_texts(texts)
    for text, row in zip(texts, rows, strict=True):
        wanted = own(repository, text=PROMPTS["Classification"] + text)
        assert close(row, wanted[0])
    assert close(encoder.run("text", encoder.tokenize(texts)), rows)
    assert encoder.embed_texts(["a bird " * 9000]).shape == (1, 12)


def test_a_batch_changes_nothing(encoder: Encoder, film: Film, sound: Sound) -> None:
    media = [png(noise(n, (50, 37))) for n in (1, 2)]
    media += [film(frames=20, draw=lambda n, at=at: noise(n + at, (64, 48))) for at in (0, 99)]
    media += [sound(seconds=2, samples=None if n else np.zeros(88_200)) for n in (0, 1)]
    for one, other in zip(media[::2], media[1::2], strict=True):
        pair = [load_media(encoder.read, data) for data in (one, other)]
        together = encoder.run(pair[0].modality, torch.stack([m.tensor for m in pair]))
        assert close(together, encoder.embed(pair, normalize=False))


@pytest.mark.parametrize(("vision", "audio"), [(True, False), (False, True), (False, False)])
def test_a_repository_without_a_part_does_not_know_its_media(
    tmp_path: Path, vision: bool, audio: bool
) -> None:
    save_embedding_gemma2(tmp_path, vision=vision, audio=audio)
    encoder = open_encoder(tmp_path)
    seen, heard = ("image", "video"), ("audio",)
    assert encoder.modalities == (*seen * vision, *heard * audio, "text")
    for modality in encoder.modalities:
        encoder.tower(modality)
    with pytest.raises(WeightsError, match="has no tower for"):
        encoder.tower("image" if audio else "audio")


def test_a_tower_is_read_without_the_others(
    repository: Repository, encoder: Encoder, tmp_path: Path, sound: Sound
) -> None:
    media = {"image": png(noise(1, (50, 37))), "audio": sound()}
    weights = load_file(repository[0] / "model.safetensors")
    for modality, data in media.items():
        medium = load_media(encoder.read, data)
        other = {"image": "audio", "audio": "vision"}[modality]
        part = {name: value for name, value in weights.items() if other not in name}
        folder = with_weights(repository[0], tmp_path / modality, part)
        alone = open_encoder(folder)
        rows = [one.embed([medium], normalize=False) for one in (alone, encoder)]
        assert close(*rows)
        mine = {"image": "vision_tower.", "audio": "audio_tower."}[modality]
        del part[next(name for name in part if name.startswith(mine))]
        less = with_weights(repository[0], tmp_path / f"less-{modality}", part)
        with pytest.raises(WeightsError, match="1 tensors are missing"):
            open_encoder(less).embed([medium], normalize=False)


@pytest.mark.parametrize(
    ("file", "part", "changes", "said"),
    [
        ("config.json", "", {"boi_token_id": 10**9}, "has ids for media that are none"),
        ("config.json", "audio_config", {"attention_chunk_size": 10**9}, "the tower does not take"),
        ("processor_config.json", "image_processor", {"patch_size": 4}, "the tower does not take"),
        ("processor_config.json", "image_processor", {"max_soft_tokens": 1120}, "1120 soft tokens"),
        ("processor_config.json", "video_processor", {"fps": 2000}, "2000 frames a second"),
        ("processor_config.json", "video_processor", {"add_timestamps": True}, "add_timestamps"),
        ("processor_config.json", "feature_extractor", {"dither": 1.0}, "with noise of 1.0"),
        (
            "processor_config.json",
            "feature_extractor",
            {"feature_size": 2048, "sampling_rate": 200_000, "frame_length_ms": 2048},
            "asks for a huge filter bank",
        ),
        (
            "processor_config.json",
            "feature_extractor",
            {"feature_extractor_type": "WhisperFeatureExtractor"},
            "has a WhisperFeatureExtractor",
        ),
    ],
)
def test_what_the_towers_do_not_take_is_refused_at_opening(
    repository: Repository, tmp_path: Path, file: str, part: str, changes: Any, said: str
) -> None:
    shutil.copytree(repository[0], tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / file).read_text())
    (fields[part] if part else fields).update(changes)
    (tmp_path / file).write_text(json.dumps(fields))
    with pytest.raises(ChatBindError, match=said):
        open_encoder(tmp_path)


def test_a_tokenizer_that_breaks_over_a_text_is_one_line(
    repository: Repository, tmp_path: Path
) -> None:
    shutil.copytree(repository[0], tmp_path, dirs_exist_ok=True)
    edit_json(
        tmp_path / "tokenizer.json",
        normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"},
    )
    with pytest.raises(ChatBindError, match="its tokenizer breaks over a text"):
        open_encoder(tmp_path).embed_texts(["a dog"])


def test_a_part_of_a_recording_is_as_if_the_rest_were_not_there(
    encoder: Encoder, film: Film, sound: Sound
) -> None:
    draw = lambda n: noise(n, (64, 48))  # noqa: E731
    whole = film(frames=40, draw=draw, gop=1, qp="0")
    part = load_media(encoder.read, whole, options=MediaOptions(start=1.0, end=3.0))
    alone = load_media(encoder.read, film(frames=20, draw=lambda n: draw(n + 10), gop=1, qp="0"))
    assert torch.equal(part.tensor, alone.tensor)
    more = load_media(encoder.read, whole, options=MediaOptions(fps=5))
    assert (len(part.tensor), len(more.tensor)) == (2, 20)
    wave = np.sin(np.arange(50 * _RATE) ** 1.1 / 20) / 2
    long = sound(samples=wave, rate=_RATE)
    later = load_media(encoder.read, long, options=MediaOptions(start=10, end=49))
    first = load_media(encoder.read, sound(samples=wave[10 * _RATE : 40 * _RATE], rate=_RATE))
    assert later.tensor.shape == (2999, 8)
    assert torch.equal(later.tensor, first.tensor)
    assert load_media(encoder.read, sound(samples=wave[:1], rate=_RATE)).tensor.shape == (1, 8)

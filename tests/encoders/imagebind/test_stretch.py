"""`--start`, `--end` and `--fps`: which part of a recording is looked at, and how densely."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from chatbind_cli import cli
from chatbind_cli.encoders.imagebind.clips import clips_of, spread_clips
from chatbind_cli.encoders.imagebind.preprocess import load_media
from chatbind_cli.errors import MediaError, SomeRecordsFailed
from chatbind_cli.media import audio
from chatbind_cli.media.options import MOST_CLIPS, MediaOptions
from tests.inference.world import World, make_world

Maker = Callable[..., bytes]
Greys = Callable[[torch.Tensor], list[list[float]]]


def load(data: bytes, modality: str, **options: Any) -> torch.Tensor:
    return load_media(data, modality, MediaOptions(**options)).tensor


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def clips(duration: float, count: int = 3, **options: Any) -> list[tuple[float, float]]:
    found = clips_of(duration, MediaOptions(**options), count, "x.mp4", frames=True)
    return [(float(start), float(end)) for start, end in found]


def test_without_a_stretch_clips_are_spread_over_all() -> None:
    for duration in (0.5, 2.0, 9.0):
        wanted = spread_clips(duration, count=3, seconds=2.0)
        assert clips_of(duration, MediaOptions(), 3, "x") == wanted
        assert clips_of(duration, MediaOptions(start=0.0), 3, "x") == wanted


def test_clips_lie_inside_their_stretch() -> None:
    assert clips(60.0, start=10.0, end=20.0) == [(10, 12), (14, 16), (18, 20)]
    assert clips(60.0, start=10.0, end=20.0, clip_sampler="chatbind")[-1] == (
        15 + 1 / 3,
        17 + 1 / 3,
    )
    assert clips(60.0, start=10.0, end=11.0) == 3 * [(10, 11)]
    assert clips(15.0, start=10.0, end=99.0) == [(10, 12), (11.5, 13.5), (13, 15)]
    assert clips(15.0, end=4.0) == [(0, 2), (1, 3), (2, 4)]
    with pytest.raises(MediaError, match=r"x.mp4: has 15 seconds, and none after 15"):
        clips(15.0, start=15.0)


def test_frames_a_second_decide_how_many_clips_there_are() -> None:
    assert len(clips(60.0)) == 3
    assert len(clips(60.0, fps=1.0)) == 30
    assert len(clips(60.0, fps=1.0, start=50.0)) == 5
    assert len(clips(0.3, fps=1.0)) == 1
    assert len(clips(1e6, fps=30.0)) == MOST_CLIPS
    assert clips_of(60.0, MediaOptions(fps=1.0), 3, "x") == spread_clips(60, count=3, seconds=2)
    assert clips(60.0, fps=0.1) == [(0, 2), (29, 31), (58, 60)]


def test_a_stretch_of_a_video_is_as_a_video_of_it_alone(film: Maker, clip_greys: Greys) -> None:
    def draw(index: int) -> np.ndarray:
        return np.full((48, 64, 3), index, np.uint8)

    whole = film("matroska", "ffv1", frames=200, draw=draw)
    part = film("matroska", "ffv1", frames=50, draw=lambda index: draw(index + 120))
    assert torch.equal(load(whole, "video", start=12.0, end=17.0), load(part, "video"))
    assert not torch.equal(load(whole, "video"), load(part, "video"))
    # less than a frame of time: the one on display
    for pair in clip_greys(load(whole, "video", start=12.02, end=12.06)):
        assert pair == pytest.approx([120, 120], abs=1)


def test_what_lies_between_the_clips_is_seen_at_more_frames_a_second(
    film: Maker, clip_greys: Greys
) -> None:
    def draw(index: int) -> np.ndarray:
        return np.full((48, 64, 3), 255 if 24 <= index < 36 else 0, np.uint8)  # white 12 to 18 s

    data = film("matroska", "ffv1", frames=80, rate=2, draw=draw)
    assert np.max(clip_greys(load(data, "video"))) < 5
    seen = np.array(clip_greys(load(data, "video", fps=1.0)))
    assert seen.shape == (20, 2)
    assert 0.1 < np.mean(seen > 250) < 0.2


@pytest.mark.parametrize("whole_s", [120, 1])
def test_a_stretch_of_a_sound_is_as_a_sound_of_it_alone(
    sound: Maker, whole_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audio, "_WHOLE_SECONDS", whole_s)  # of longer ones only clips are decoded
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000 * 10)
    whole = sound(samples=samples, rate=16_000)
    part = sound(samples=samples[16_000 * 4 : 16_000 * 7], rate=16_000)
    cut = load(whole, "audio", start=4.0, end=7.0)
    torch.testing.assert_close(cut, load(part, "audio"), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(load(whole, "audio"), cut, atol=0.1)
    with pytest.raises(MediaError, match="has 10 seconds, and none after 11"):
        load(whole, "audio", start=11.0)


def test_a_recording_that_ends_before_is_one_failed_record(world: World) -> None:
    words = ["vqa", "-m", str(world.model), "--media-root", str(world.media), "--device", "cpu"]
    records = [
        {"question_id": 1, "text": "What is this?", "audio": "tone.wav"},
        {"question_id": 2, "text": "What is this?", "image": "1.png"},
    ]
    asked = "\n".join(map(json.dumps, records))
    words += ["--max-new-tokens", "2", "--end", "9"]
    done = CliRunner().invoke(cli.app, [*words, "--start", "1"], input=asked)
    heard = [json.loads(line) for line in done.stdout.splitlines()]
    assert heard[0]["metadata"]["media_options"] == {"start": 1.0, "end": 9.0}
    late = CliRunner().invoke(cli.app, [*words, "--start", "2"], input=asked)
    assert isinstance(late.exception, SomeRecordsFailed)
    first, second = (json.loads(line) for line in late.stdout.splitlines())
    assert "tone.wav: has 2 seconds, and none after 2" in str(first["error"])
    assert "error" not in second


def test_a_store_is_asked_for_the_same_stretch(world: World, tmp_path: Path) -> None:
    encode = ["encode", "--encoder", str(world.encoder), "--device", "cpu", "--media-root"]
    encode += [str(world.media), "--store", str(tmp_path / "store"), "--start", "1"]
    done = CliRunner().invoke(cli.app, encode, input='{"audio": "tone.wav"}')
    assert done.exception is None, done.output
    words = ["vqa", "-m", str(world.model), "--device", "cpu", "--store", str(tmp_path / "store")]
    words += ["--max-new-tokens", "2"]
    asked = json.dumps({"question_id": 1, "text": "What is this?", "audio": "tone.wav"})
    told = CliRunner().invoke(cli.app, [*words, "--start", "1"], input=asked)
    assert told.exception is None, told.output
    other = CliRunner().invoke(cli.app, words, input=asked)
    assert "is in the store, but not as the model takes it" in other.stdout

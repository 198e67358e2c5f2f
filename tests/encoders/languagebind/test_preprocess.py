"""Media that the reference cannot read, and choices that it leaves to chance."""

from __future__ import annotations

import io
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import torchaudio
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from chatbind_cli.encoders.encoder import load_media
from chatbind_cli.encoders.languagebind.config import VisionConfig
from chatbind_cli.encoders.languagebind.preprocess import Reader
from chatbind_cli.encoders.pixels import CLIP_MEAN, CLIP_STD
from chatbind_cli.errors import MediaError
from chatbind_cli.media.options import MediaOptions
from tests.recordings import image_file, npy

CONFIGS = {
    "image": VisionConfig(),
    "thermal": VisionConfig(),
    "depth": VisionConfig(),
    "video": VisionConfig(num_frames=8),
    "audio": VisionConfig(num_mel_bins=112, target_length=1036, audio_mean=-4.27, audio_std=4.57),
}
READ = Reader(CONFIGS)


def read(data: bytes | Path, modality: str, **options: Any) -> torch.Tensor:
    return load_media(READ, data, modality, MediaOptions(**options)).tensor


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Without mean and deviation."""
    return tensor * torch.tensor(CLIP_STD)[:, None, None] + torch.tensor(CLIP_MEAN)[:, None, None]


@pytest.mark.parametrize("size", [(224, 224), (300, 223), (17, 31), (31, 1201), (641, 45)])
def test_pictures_of_any_size_are_resized_as_torchvision_once_did(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    map_mm = rng.integers(1, 12_000, size).astype(np.uint16)
    share = torch.from_numpy(map_mm / 1000).clamp(0.01, 10).float().expand(3, -1, -1) / 10
    for modality, pixels, data in (
        ("image", transforms.to_tensor(colours), colours),
        ("depth", share, map_mm),
    ):
        fitted = transforms.resize(pixels, 224, InterpolationMode.BICUBIC, antialias=False)
        wanted = transforms.normalize(transforms.center_crop(fitted, 224), CLIP_MEAN, CLIP_STD)
        assert torch.allclose(read(image_file(data), modality), wanted, atol=1e-5)


@pytest.mark.parametrize("modality", ["image", "thermal"])
def test_pictures_of_every_kind_are_read_as_rgb(modality: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (240, 300), dtype=np.uint8)
    wanted = read(image_file(np.stack([noise] * 3, axis=2)), modality)
    clear = np.full_like(noise, 99)
    for data in (
        image_file(noise),
        image_file(np.stack([noise] * 3 + [clear], axis=2)),
        image_file(Image.fromarray(noise).convert("P")),
        image_file(noise.astype(np.uint16) * 257),
    ):
        assert torch.equal(read(data, modality), wanted)


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 256, (240, 300, 3), dtype=np.uint8)
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(np.rot90(values)).save(tmp_path / "turned.png", exif=tags)
    assert torch.equal(read(tmp_path / "turned.png", "image"), read(image_file(values), "image"))


def test_a_strip_is_read_without_filling_the_memory() -> None:
    strip = image_file(np.zeros((2, 60_000, 3), np.uint8))
    assert read(strip, "image").shape == (3, 224, 224)


def test_depth_is_a_share_of_the_largest_and_holes_are_near() -> None:
    map_mm = np.full((224, 224), 2500, np.uint16)
    map_mm[:112] = 0
    values = plain(read(image_file(map_mm), "depth"))
    assert torch.allclose(values[:, 200, 5], torch.tensor(0.25))
    assert torch.allclose(values[:, 5, 5], torch.tensor(0.001), atol=1e-6)
    far = plain(read(image_file(np.full((9, 9), 12_000, np.uint16)), "depth"))
    assert torch.allclose(far, torch.tensor(1.0))
    read_own = Reader({"depth": VisionConfig(max_depth=0)})
    own = plain(load_media(read_own, image_file(map_mm // 5), "depth").tensor)
    assert torch.allclose(own[:, 200, 5], torch.tensor(1.0))


def test_depth_of_other_units_becomes_metres_or_is_one_line() -> None:
    data = npy(np.full((9, 9), 10.0, np.float32))
    options = {"depth_baseline_m": 0.1, "depth_focal_px": 500.0, "depth_unit": "disparity"}
    assert torch.allclose(plain(read(data, "depth", **options)), torch.tensor(0.5))
    with pytest.raises(MediaError, match="says no metres"):
        read(data, "depth", depth_unit="relative")
    with pytest.raises(MediaError, match="says nothing of its unit"):
        read(image_file(np.full((9, 9), 10, np.uint8)), "depth")


def test_an_array_of_heat_is_a_grey_picture() -> None:
    heat = npy(np.full((9, 9), 0.5, np.float32))
    assert torch.allclose(plain(read(heat, "thermal")), torch.tensor(0.5))


def test_frames_are_spread_over_the_film_or_a_stretch_of_it(film: Callable[..., bytes]) -> None:
    data = film(frames=40, rate=10, gop=12)

    def seen(**options: float) -> list[int]:
        shown = plain(read(data, "video", **options).transpose(0, 1))[:, 0, 9, 9] * 255
        return [round(float(grey) / 5) for grey in shown]

    assert seen() == [0, 5, 11, 16, 22, 27, 33, 39]
    assert seen(start=1.0, end=2.0) == [10, 11, 12, 13, 15, 16, 17, 19]
    assert seen(start=3.95) == [39] * 8
    with pytest.raises(MediaError, match="none after 7"):
        seen(start=7.0)


@pytest.mark.parametrize("size", [(65, 49), (48, 98)])
def test_frames_of_any_pace_and_size_are_counted_and_not_timed(
    size: tuple[int, int], film: Callable[..., bytes]
) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 200, (*size[::-1], 3), dtype=np.uint8)
    paces = (100 * np.cumsum(rng.integers(1, 5, 21))).tolist()
    how = {"size": size, "pixels": "yuv444p", "frames": 21, "milliseconds": paces}
    data = film("matroska", draw=lambda n: np.roll(noise, 3 * n, axis=1) + n, **how)
    with av.open(io.BytesIO(data)) as opened:
        frames = [frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)]
    chosen = np.stack([frames[int(20 * n / 7)] for n in range(8)])
    coloured = transforms.normalize(
        torch.from_numpy(chosen).permute(0, 3, 1, 2) / 255, CLIP_MEAN, CLIP_STD
    )
    sides = [224 * side // min(size) for side in size[::-1]]
    scaled = torch.nn.functional.interpolate(coloured, sides, mode="bilinear", align_corners=False)
    wanted = transforms.center_crop(scaled, 224).transpose(0, 1)
    assert torch.allclose(read(data, "video"), wanted, atol=1e-5)


def test_frames_before_the_start_of_an_edited_film_do_not_count(film: Callable[..., bytes]) -> None:
    buffer = io.BytesIO()
    with (
        av.open(io.BytesIO(film(frames=40, rate=10, gop=40))) as whole,
        av.open(buffer, "w", format="mp4") as cut,
    ):
        stream = whole.streams.video[0]
        copied = cut.add_stream_from_template(stream)
        for packet in whole.demux(stream):
            if packet.size:  # a second earlier
                packet.pts -= int(1 / stream.time_base)
                packet.dts -= int(1 / stream.time_base)
                packet.stream = copied
                cut.mux(packet)
    shown = plain(read(buffer.getvalue(), "video").transpose(0, 1))[:, 0, 9, 9] * 255
    assert [round(float(grey) / 5) for grey in shown] == [10, 14, 18, 22, 26, 30, 34, 39]


def test_a_film_that_is_cut_short_is_refused(film: Callable[..., bytes]) -> None:
    data = film("matroska", frames=40, rate=10, gop=4)
    with pytest.raises(MediaError, match="is cut short"):
        read(data[: len(data) * 6 // 10], "video")


def test_a_short_sound_is_repeated_and_a_still_shorter_one_gets_silence(
    sound: Callable[..., bytes],
) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)

    def heard(samples: np.ndarray, **options: float) -> torch.Tensor:
        return read(sound(codec="pcm_f32le", samples=samples, rate=16_000), "audio", **options)

    found = heard(noise)  # 98 windows
    assert found.shape == (3, 112, 1036)
    assert torch.equal(found[0, :, 98:196], found[0, :, :98])
    assert torch.equal(found[0], found[2])
    assert heard(noise[:100]).isfinite().all()
    later = heard(np.concatenate([np.zeros(8000, np.float32), noise]), start=0.5)
    assert torch.allclose(later, found, atol=1e-4)


@pytest.mark.parametrize(
    ("rate", "samples", "starts"),
    [
        (16_000, 400, (0, 0, 0)),
        (16_000, 166_159, (0, 0, 0)),  # the last sample that makes no window more
        (44_100, 544_000, (0, 98, 196)),
        (47_952, 700_000, (0, 211, 422)),
        (8_000, 1_000_000, (0, 5731, 11_462)),  # longer than what is decoded whole
    ],
)
def test_a_sound_of_any_rate_and_length_is_windows_of_its_filter_bank(
    rate: int, samples: int, starts: tuple[int, ...]
) -> None:
    """Of the first of two channels, whole: resampled, and the mean of both taken away."""
    noise = np.random.default_rng(0).normal((800, -3000), 3000, (samples, 2))
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((2, 2, rate, 0, "NONE", ""))
        file.writeframes(noise.astype("<i2").tobytes())
    both = torch.from_numpy(noise.astype(np.int16).T / 32_768).float()
    heard = torchaudio.functional.resample(both, rate, 16_000)
    how = {"htk_compat": True, "window_type": "hanning", "num_mel_bins": 112, "dither": 0.0}
    bank = (torchaudio.compliance.kaldi.fbank(heard - heard.mean(), **how).T + 4.27) / 9.14
    repeated = bank.repeat(1, -(-1036 // bank.shape[1]))
    found = read(buffer.getvalue(), "audio")
    for window, start in zip(found, starts, strict=True):
        assert torch.allclose(window, repeated[:, start : start + 1036], atol=1e-3)

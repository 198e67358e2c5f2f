from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from chatbind_cli.encoders.imagebind.vision import load_video
from chatbind_cli.errors import MediaError
from chatbind_cli.media import container, video
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import open_source

Maker = Callable[..., bytes]
Greys = Callable[[torch.Tensor], list[list[float]]]


def load(data: bytes | Path, **options: object) -> torch.Tensor:
    return load_video(open_source(data), MediaOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("summary", "sampler", "clips", "name"),
    [
        ("pin", "imagebind", 5, "video_decord_grad_64x48_10fps_7s"),
        ("pin", "imagebind", 3, "video_decord_3clips_grad_64x48_10fps_7s"),
        ("pypi", "chatbind", 5, "video_decord_grad_64x48_10fps_7s"),
        ("pypi", "pytorchvideo", 3, "video_decord_3clips_grad_64x48_10fps_7s"),
    ],
)
def test_video_equals_the_reference(
    golden: Path, summary: str, sampler: str, clips: int, name: str
) -> None:
    if sampler == "pytorchvideo":
        pytest.importorskip("pytorchvideo.data.clip_sampling")
    tensor = load(
        golden / "preprocess/media/grad_64x48_10fps_7s.mp4",
        video_clips=clips,
        clip_sampler=sampler,
    )
    expected = json.loads((golden / f"preprocess/summary_{summary}.json").read_text())[name]
    assert [1, *tensor.shape] == expected["shape"]
    error = np.abs(tensor.numpy().reshape(-1)[expected["flat_index"]] - expected["value"]).max()
    assert error <= 2e-6  # float32 rounding of values up to 2.2; measured 4.8e-7
    assert abs(float(tensor.mean()) - expected["mean"]) < 1e-6


def test_every_value_of_the_video_equals_the_stored_reference(golden: Path) -> None:
    tensor = load(golden / "preprocess/media/grad_64x48_10fps_7s.mp4")
    stored = np.load(golden / "preprocess/video_pin.npz")
    expected = stored[stored.files[0]][0].astype(np.float32)
    assert np.abs(tensor.numpy() - expected).max() <= 1e-3 + 1e-4  # storage in float16


@pytest.mark.parametrize(
    ("box", "codec", "pixels"),
    [
        ("mp4", "libx264", "yuv420p"),
        ("matroska", "libx264", "yuv420p"),
        ("webm", "libvpx-vp9", "yuv420p"),
        ("gif", "gif", "rgb8"),
        ("avi", "mjpeg", "yuvj420p"),
        ("flv", "flv", "yuv420p"),
        ("mov", "libx264", "yuv420p10le"),
    ],
)
def test_first_and_last_frame_of_each_clip_are_taken_in_every_container(
    film: Maker, clip_greys: Greys, box: str, codec: str, pixels: str
) -> None:
    greys = clip_greys(load(film(box, codec, pixels=pixels)))
    # 5 s at 10 frames a second: clips start at 0, 0.75, 1.5, 2.25, 3 and last 2 s
    frames = [(0, 19), (8, 27), (15, 34), (23, 42), (30, 49)]
    for (first, last), (a, b) in zip(frames, greys, strict=True):
        # chroma subsampling, quantisation and GIF's palette move a level a little; a neighbouring
        # frame is 5 levels away
        assert abs(a - 5 * first) < 2.45 and abs(b - 5 * last) < 2.45


def test_frames_of_uneven_duration_are_taken_by_time_and_not_by_number(
    film: Maker, clip_greys: Greys
) -> None:
    # 1 s at 20 frames a second, then 5 s at 2, so clips by number would be far off
    stamps = [50 * i for i in range(20)] + [1000 + 500 * i for i in range(10)]
    data = film("matroska", "ffv1", frames=30, milliseconds=stamps)
    seconds = (stamps[-1] + 50) / 1000
    greys = clip_greys(load(data, video_clips=2))
    times = np.array(stamps) / 1000
    for start, (first, last) in zip((0, seconds - 2), greys, strict=True):
        inside = np.flatnonzero((times >= start) & (times < start + 2))
        assert abs(first - 5 * inside[0]) < 2.45 and abs(last - 5 * inside[-1]) < 2.45


def test_a_clip_without_a_new_frame_shows_the_one_on_display(
    film: Maker, clip_greys: Greys
) -> None:
    # slides: of the clips at 0, 8, 16 and 24 s, the middle two hold no frame of their own
    data = film("matroska", "ffv1", frames=4, milliseconds=[0, 7_000, 20_000, 26_000])
    greys = clip_greys(load(data, video_clips=4))
    for (first, last), slide in zip(greys, (0, 1, 1, 3), strict=True):
        assert first == last and abs(first - 5 * slide) < 2.45


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_a_video_shorter_than_a_clip_gives_equal_clips(
    film: Maker, clip_greys: Greys, frames: int
) -> None:
    greys = clip_greys(load(film(frames=frames)))
    assert len(greys) == 5 and all(pair == greys[0] for pair in greys)
    assert abs(greys[0][0]) < 1.5 and abs(greys[0][1] - 5 * (frames - 1)) < 2.45


def quarters(_: int) -> np.ndarray:
    """Red and green above blue and white."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32], picture[:24, 32:] = (255, 0, 0), (0, 255, 0)
    picture[24:, :32], picture[24:, 32:] = (0, 0, 255), (255, 255, 255)
    return picture


def test_a_phones_video_is_turned_upright(film: Maker) -> None:
    data = film(frames=3, draw=quarters, codec="libx264rgb", pixels="rgb24", qp="0")
    straight = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 2**30)
    clockwise = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 2**30)
    at = data.index(straight, data.index(b"tkhd"))
    turned = load(data[:at] + clockwise + data[at + 36 :], video_clips=1)
    # upright: 48 wide, 64 high; crops run from top to bottom
    top, bottom = turned[0, :, 0], turned[2, :, 0]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])

    def colour(crop: torch.Tensor, y: int, x: int) -> list[int]:
        return [round(v) for v in (crop[:, y, x] * std + mean).tolist()]

    assert colour(top, 5, 5) == [0, 0, 1] and colour(top, 5, -5) == [1, 0, 0]
    assert colour(bottom, -5, 5) == [1, 1, 1] and colour(bottom, -5, -5) == [0, 1, 0]


@pytest.mark.parametrize("size", [(50, 50), (64, 4), (4, 64), (67, 51), (1000, 30)])
def test_odd_sizes_are_read(film: Maker, size: tuple[int, int]) -> None:
    data = film("matroska", "ffv1", frames=2, size=size)
    assert load(data, video_clips=1).shape == (3, 3, 2, 224, 224)


def test_an_hours_long_video_is_sought_and_not_decoded_through(
    film: Maker, clip_greys: Greys, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = film(frames=3600, rate=1, size=(16, 16), gop=30, preset="ultrafast")
    count = 0
    real = container.decoded

    def counted(*args: object) -> object:
        nonlocal count
        for frame in real(*args):  # type: ignore[arg-type]
            count += 1
            yield frame

    monkeypatch.setattr(video, "decoded", counted)
    greys = clip_greys(load(hours))
    starts = [round(i * 3598 / 4 + 0.49) for i in range(5)]
    for start, (first, _) in zip(starts, greys, strict=True):
        assert abs((first - 5 * start + 128) % 256 - 128) < 3
    assert count < 400  # at most a group of pictures and the decoder's delay for each clip


def test_a_container_that_cannot_seek_is_read_through(
    film: Maker, clip_greys: Greys, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = film(frames=84, rate=2)
    expected = clip_greys(load(data))
    monkeypatch.setattr(video, "seek_before", lambda *args: container.rewind(args[0]))
    assert clip_greys(load(data)) == expected


def test_a_missing_duration_is_measured(film: Maker, clip_greys: Greys) -> None:
    whole = film("matroska", "libx264", frames=50)
    # as a live stream is saved: the Duration element (0x4489, 8 bytes) is void (0xEC)
    at = whole.index(b"\x44\x89\x88")
    live = whole[:at] + b"\xec\x89" + bytes(9) + whole[at + 11 :]
    with container.open_container(open_source(live)) as opened:
        declared = container.declared_seconds(opened, container.video_streams(opened)[0])
    assert declared is None
    np.testing.assert_allclose(clip_greys(load(live)), clip_greys(load(whole)), atol=1.5)


def test_a_header_that_promises_hours_for_seconds_is_refused(film: Maker) -> None:
    data = film("matroska", "libx264", frames=50)
    at = data.index(b"\x44\x89\x88") + 3
    lying = data[:at] + struct.pack(">d", 36_000_000.0) + data[at + 8 :]
    with pytest.raises(MediaError, match=r"cut short: 5(\.\d+)? of 3\.6e\+04 seconds"):
        load(lying)


@pytest.mark.parametrize("box", ["mp4", "matroska", "webm", "avi"])
def test_a_truncated_video_is_refused(film: Maker, box: str) -> None:
    codec, pixels = {"webm": ("libvpx-vp9", "yuv420p"), "avi": ("mjpeg", "yuvj420p")}.get(
        box, ("libx264", "yuv420p")
    )
    data = film(box, codec, pixels=pixels)
    with pytest.raises(MediaError) as caught:
        load(data[: len(data) // 2])
    assert "\n" not in str(caught.value)


def test_sound_is_not_video_and_a_playlist_opens_nothing(sound: Maker, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="holds no video"):
        load(sound())
    film_path = tmp_path / "film.ts"
    film_path.write_bytes(b"secret")
    for text in (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile://{film_path}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {film_path}\n",
    ):
        with pytest.raises(MediaError, match="cannot be decoded"):
            load(text.encode())
    # not even a harmless text format reaches a demuxer of FFmpeg
    with pytest.raises(MediaError, match="cannot be decoded"):
        load(b";FFMETADATA1\ntitle=x\n")


def test_huge_frames_are_refused_before_they_are_decoded(film: Maker) -> None:
    with pytest.raises(MediaError, match="64 x 48, more than 1,000 pixels; raise --max-pixels"):
        load(film(frames=2), max_pixels=1000)


def test_a_sliver_of_a_video_is_refused(film: Maker) -> None:
    with pytest.raises(MediaError, match="too narrow"):
        load(film("matroska", "ffv1", frames=2, size=(2000, 20)))

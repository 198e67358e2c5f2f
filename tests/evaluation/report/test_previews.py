"""Media in the report: what a browser gets for each modality, and what it is spared."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chatbind_cli.errors import MediaError
from chatbind_cli.evaluation.report.previews import Preview, Previews, preview_of
from chatbind_cli.media import guard
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.root import MediaRoot
from chatbind_cli.media.source import MediaSource, open_source
from tests.evaluation import sample


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    sample.make_media(folder)
    return folder


def _one(previews: Previews, modality: str) -> Preview:
    return previews.show(modality, sample.FILES[modality])


def _bytes(preview: Preview) -> tuple[str, bytes]:
    kind, _, text = preview.uri.partition(";base64,")
    return kind, base64.b64decode(text)


def test_a_picture_becomes_a_small_jpeg(media: Path) -> None:
    big = media / "big.png"
    Image.fromarray(np.zeros((1500, 3000, 3), np.uint8)).save(big)
    kind, data = _bytes(preview_of(open_source(big), "image"))
    picture = Image.open(io.BytesIO(data))
    assert (kind, picture.format, picture.size) == ("data:image/jpeg", "JPEG", (640, 320))


def test_depth_is_red_where_it_is_near_and_clear_where_nothing_was_measured(media: Path) -> None:
    previews = Previews(MediaRoot(media))
    preview = _one(previews, "depth")
    kind, data = _bytes(preview)
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    assert kind == "data:image/png"
    near, far = pixels[12, 0].astype(int), pixels[59, 79].astype(int)
    assert near[0] > near[2] + 50
    assert far[2] > far[0]
    assert pixels[0, 0, 3] == 0
    assert near[3] == 255
    y, x = np.mgrid[0:60, 0:80]
    metres = (0.5 + 0.02 * x + 0.01 * y)[(x >= 10) | (y >= 10)]
    low, high = np.percentile(metres, [2, 98])
    assert preview.scale == ("turbo", f"far, {high:.2f} m", f"near, {low:.2f} m")
    eight_bits = io.BytesIO()
    Image.fromarray(np.full((4, 4), 200, np.uint8)).save(eight_bits, "PNG")
    for unit, low_end in (("auto", "dark"), ("mm", "far, 0.20 m")):
        source = MediaSource("x", data=eight_bits.getvalue())
        shown = preview_of(source, "depth", MediaOptions(depth_unit=unit))
        assert shown.scale is not None
        assert shown.scale.low == low_end


def test_heat_is_bright_where_it_is_warm(media: Path) -> None:
    previews = Previews(MediaRoot(media))
    preview = _one(previews, "thermal")
    pixels = np.asarray(Image.open(io.BytesIO(_bytes(preview)[1]))).astype(int)
    assert pixels[59, 79, :3].sum() > pixels[0, 0, :3].sum() + 300


def test_a_sound_becomes_an_mp3_of_the_same_pitch(media: Path) -> None:
    import av

    previews = Previews(MediaRoot(media))
    kind, data = _bytes(_one(previews, "audio"))
    assert kind == "data:audio/mpeg"
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.audio[0]
        samples = np.concatenate([f.to_ndarray().ravel() for f in container.decode(stream)])
        rate = stream.rate
    assert len(samples) / rate == pytest.approx(1.0, abs=0.15)
    spectrum = np.abs(np.fft.rfft(samples))
    assert np.argmax(spectrum) * rate / len(samples) == pytest.approx(440, abs=5)


def test_a_film_becomes_a_small_mp4_of_the_same_length(media: Path) -> None:
    import av

    previews = Previews(MediaRoot(media))
    kind, data = _bytes(_one(previews, "video"))
    assert kind == "data:video/mp4"
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    assert (frames[0].width, frames[0].height) == (640, 360)
    assert frames[-1].time == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("rate", [10, 60])
def test_a_film_of_another_rate_keeps_its_length(tmp_path: Path, rate: int) -> None:
    import av

    with av.open(str(tmp_path / "film.mp4"), "w") as film:
        stream = film.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(2 * rate):
            picture = np.full((48, 64, 3), i, np.uint8)
            film.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        film.mux(stream.encode(None))
    _, data = _bytes(preview_of(open_source(tmp_path / "film.mp4"), "video"))
    with av.open(io.BytesIO(data)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert len(times) == pytest.approx(2 * min(rate, 25), abs=1)
    assert times[-1] == pytest.approx(2, abs=0.11)


def test_motion_becomes_two_panels_of_three_curves(media: Path) -> None:
    preview = _one(Previews(MediaRoot(media)), "imu")
    turning = preview.panels[1]
    assert [panel.title for panel in preview.panels] == ["acceleration, m/s²", "turning, rad/s"]
    assert [name for name, _ in turning.curves] == ["x", "y", "z"]
    assert (turning.low, turning.high) == (-1.0, 1.0)
    points = [tuple(map(float, point.split(","))) for point in turning.curves[1][1].split()]
    # cos t starts at the top and is lowest at pi of 5 seconds
    assert points[0] == pytest.approx((0, 0), abs=0.5)
    assert max(points, key=lambda point: point[1])[0] == pytest.approx(500 * np.pi / 5, abs=15)


def test_a_medium_that_many_ask_about_is_kept_once(media: Path) -> None:
    previews = Previews(MediaRoot(media))
    assert _one(previews, "image") is _one(previews, "image")
    assert list(previews.kept) == ["media-1"]


def test_what_cannot_be_shown_is_named_with_its_reason(media: Path) -> None:
    previews = Previews(MediaRoot(media))
    (media / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    names = ["gone.jpg", "../secret.jpg", "broken.jpg"]
    found = [previews.show("image", name) for name in names]
    assert [preview.tag for preview in found] == ["", "", ""]
    assert found[0].note == "cannot be shown: no such file"
    assert "leaves the media root" in found[1].note
    assert previews.problems[0].startswith("3 media cannot be shown; ")


def test_a_decoder_that_fails_in_a_way_of_its_own_costs_one_preview(
    media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("odd tables")

    monkeypatch.setattr("chatbind_cli.evaluation.report.previews.open_rgb", fail)
    previews = Previews(MediaRoot(media))
    assert "odd tables" in _one(previews, "image").note
    assert _one(previews, "audio").tag == "audio"


def test_media_beyond_the_limit_are_only_named(media: Path) -> None:
    previews = Previews(MediaRoot(media), limit_bytes=3000)
    kinds = [_one(previews, modality).tag for modality in ("image", "audio", "depth")]
    assert kinds[1] == ""
    assert previews.problems[-1].endswith("go beyond --media-limit and are only named")


def test_a_sound_is_no_film(media: Path) -> None:
    with pytest.raises(MediaError, match="holds no video"):
        preview_of(open_source(media / "tone.wav"), "video")
    with pytest.raises(MediaError, match="holds no sound"):
        preview_of(open_source(media / "square.mp4"), "audio")


@pytest.mark.parametrize("modality", ["audio", "video"])
def test_a_decode_that_takes_too_long_ends(
    media: Path, modality: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "ONE_SECONDS", -1.0)
    with pytest.raises(MediaError, match="to decode"):
        preview_of(open_source(media / sample.FILES[modality]), modality)

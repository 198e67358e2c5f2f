"""Media files as a browser can show them: pictures, sounds, films and curves, all of them small.

A person is to see what the model was asked about, so depth and heat get false colours and motion
becomes curves. Files are read by the media room's own readers, with its limits. Knows nothing of
pages.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from chatbind_cli.errors import MediaError
from chatbind_cli.imagebind.config import IMU_SECONDS
from chatbind_cli.imagebind.imu import load_imu
from chatbind_cli.media.container import (
    audio_streams,
    decoded,
    open_container,
    video_streams,
)
from chatbind_cli.media.maps import open_map
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.pictures import open_rgb
from chatbind_cli.media.source import MediaSource
from chatbind_cli.review.exhibits import Curve, Panel, Scale

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

_LONGEST_SIDE = 640
_FILM_SIDE = 320
_FILM_SECONDS = 20
_FILM_RATE = 25
_SOUND_SECONDS = 60
_SOUND_RATE_HZ = 32_000
_SOUND_BITS_PER_SECOND = 64_000

PLOT_WIDTH, PLOT_HEIGHT = 500, 90
"""Size of one panel of curves, in SVG units."""

_OPTIONS = MediaOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """Bytes for a browser, or curves for the page to draw.

    Attributes:
        kind: the MIME type of `data`.
        data: a file of that type.
        note: what the colours mean.
        panels: the curves.
        scale: the legend of the colours.
    """

    kind: str = ""
    data: bytes = b""
    note: str = ""
    panels: tuple[Panel, ...] = ()
    scale: Scale | None = None


def show(source: MediaSource, modality: str) -> Shown:
    """Makes one medium ready to be seen or heard.

    Raises:
        MediaError: it cannot be read as what it is said to be.
    """
    makers: dict[str, Callable[[MediaSource], Shown]] = {
        "image": _picture,
        "depth": _depth,
        "thermal": _heat,
        "audio": _sound,
        "video": _film,
        "imu": _motion,
    }
    return makers[modality](source)


def _picture(source: MediaSource) -> Shown:
    with open_rgb(source, _OPTIONS.max_pixels) as picture:
        picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        return Shown(kind="image/jpeg", data=_saved(picture, "JPEG", quality=82))


def _depth(source: MediaSource) -> Shown:
    import numpy as np

    stored = _map(source)
    values = stored.astype(np.float64)
    if stored.dtype.itemsize == 1:
        # Eight bits have no unit; estimators that write them make near bright.
        note = "false colour: blue is dark, red is bright (no unit)"
        return _coloured(values, Scale("turbo", "dark", "bright"), note)
    metres = values if stored.dtype.kind == "f" else values / 1000
    measured = np.isfinite(metres) & (metres > 0)
    if not measured.any():
        raise MediaError("holds no measured depth", where=source.name)
    near, far = np.percentile(metres[measured], [2, 98])
    note = f"false colour: red is near ({near:.2f} m), blue is far ({far:.2f} m)"
    scale = Scale("turbo", f"far, {far:.2f} m", f"near, {near:.2f} m")
    return _coloured(-metres, scale, note, measured)


def _heat(source: MediaSource) -> Shown:
    import numpy as np

    values = _map(source).astype(np.float64)
    note = "false colour: dark is cold, bright is warm"
    return _coloured(values, Scale("inferno", "cold", "warm"), note)


def _map(source: MediaSource) -> npt.NDArray[np.generic]:
    """The one channel of a depth map or thermal picture, [height, width]."""
    with open_map(source, _OPTIONS) as values:
        return values


def _coloured(
    values: npt.NDArray[np.float64],
    scale: Scale,
    note: str,
    known: npt.NDArray[np.bool_] | None = None,
) -> Shown:
    """Values in false colour; what is not known is transparent."""
    import numpy as np
    from matplotlib import colormaps
    from PIL import Image

    known = np.isfinite(values) if known is None else known
    low, high = np.percentile(values[known], [2, 98]) if known.any() else (0.0, 1.0)
    scaled = np.clip((values - low) / (high - low if high > low else 1.0), 0, 1)
    scaled = np.where(known, scaled, 0.0)
    painted = colormaps[scale.colours](scaled, bytes=True)  # [height, width, 4]
    painted[..., 3] = np.where(known, 255, 0)
    picture = Image.fromarray(painted)
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    return Shown(
        kind="image/png", data=_saved(picture, "PNG", optimize=True), note=note, scale=scale
    )


def _saved(picture: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def _sound(source: MediaSource) -> Shown:
    import av

    target = io.BytesIO()
    with open_container(source) as container:
        streams = audio_streams(container)
        if not streams:
            raise MediaError("holds no sound", where=source.name)
        with av.open(target, "w", format="mp3") as out:
            # Without the header of its encoder's statistics a file of equal sound is equal.
            coded = out.add_stream("libmp3lame", rate=_SOUND_RATE_HZ, layout="mono")
            coded.bit_rate = _SOUND_BITS_PER_SECOND
            resampler = av.AudioResampler(format="s16p", layout="mono", rate=_SOUND_RATE_HZ)
            position = 0
            for frame in _until(decoded(container, streams[0]), _SOUND_SECONDS):
                for piece in resampler.resample(frame):
                    piece.pts, piece.time_base = position, Fraction(1, _SOUND_RATE_HZ)
                    position += piece.samples
                    out.mux(coded.encode(piece))
            if position == 0:
                raise MediaError("holds no sound", where=source.name)
            out.mux(coded.encode(None))
    return Shown(kind="audio/mpeg", data=target.getvalue())


def _film(source: MediaSource) -> Shown:
    import av

    target = io.BytesIO()
    frames = 0
    with open_container(source) as container:
        streams = video_streams(container)
        if not streams:
            raise MediaError("holds no moving pictures", where=source.name)
        width, height = _film_size(streams[0].width, streams[0].height)
        rate = streams[0].average_rate or Fraction(_FILM_RATE)
        rate = min(max(rate, Fraction(1)), Fraction(_FILM_RATE))
        with av.open(target, "w", format="mp4") as out:
            coded = out.add_stream("libx264", rate=rate)
            coded.width, coded.height, coded.pix_fmt = width, height, "yuv420p"
            coded.options = {"crf": "26", "preset": "veryfast"}
            coded.codec_context.thread_count = 1
            for frame in _at_rate(_until(decoded(container, streams[0]), _FILM_SECONDS), rate):
                small = frame.reformat(width=width, height=height, format="yuv420p")
                small.pts, small.time_base = frames, 1 / rate
                frames += 1
                out.mux(coded.encode(small))
            if frames == 0:
                raise MediaError("holds no moving pictures", where=source.name)
            out.mux(coded.encode(None))
    return Shown(kind="video/mp4", data=target.getvalue())


def _film_size(width: int, height: int) -> tuple[int, int]:
    """Even numbers, as the codec wants; small films keep their size."""
    scale = min(1.0, _FILM_SIDE / max(width, height, 1))
    return max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)


def _until(frames: Iterator[Any], seconds: float) -> Iterator[Any]:
    """Frames of the first seconds. Frames that do not say their time count as they come."""
    start: float | None = None
    for frame in frames:
        time = frame.time
        if time is not None:
            start = time if start is None else start
            if time - start >= seconds:
                return
        yield frame


def _at_rate(frames: Iterator[Any], rate: Fraction) -> Iterator[Any]:
    """Leaves frames out where there are more than `rate` a second."""
    wanted = 0
    start: float | None = None
    for number, frame in enumerate(frames):
        start = frame.time if start is None else start
        time = float(number / rate) if frame.time is None or start is None else frame.time - start
        if time >= wanted / rate - 1e-3:
            wanted += 1
            yield frame


def _motion(source: MediaSource) -> Shown:
    window = load_imu(source, _OPTIONS).double().numpy()  # [6, 2000]
    panels = (
        _panel("acceleration, m/s²", window[:3]),
        _panel("turning, rad/s", window[3:]),
    )
    return Shown(panels=panels, note=f"{IMU_SECONDS:g} s; solid x, dashed y, dotted z")


def _panel(title: str, rows: npt.NDArray[np.float64]) -> Panel:
    import numpy as np

    low, high = float(rows.min()), float(rows.max())
    span = high - low if high > low else 1.0
    curves = []
    for name, row in zip("xyz", rows, strict=True):
        # The lowest and the highest of each stretch, so that no tap is lost in the drawing.
        pieces = np.array_split(row, PLOT_WIDTH // 4)
        values = [value for piece in pieces for value in (piece.min(), piece.max())]
        step = PLOT_WIDTH / (len(values) - 1)
        points = " ".join(
            f"{x * step:.0f},{PLOT_HEIGHT * (high - value) / span:.1f}"
            for x, value in enumerate(values)
        )
        curves.append(Curve(name, points))
    return Panel(title, tuple(curves), round(low, 2), round(high, 2))

"""Media files as a browser can show them: pictures, sounds, films and curves, all of them small.

A person is to see what the model was asked about, so depth and heat get false colours and motion
becomes curves. Files are read as `chatbind_cli.media` reads them, with its limits; every medium is
kept once, however many questions ask about it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import av
import numpy as np
import numpy.typing as npt

from chatbind_cli.errors import MediaError, contained
from chatbind_cli.media.audio import read_stretches
from chatbind_cli.media.maps import open_depth, open_map
from chatbind_cli.media.motion import read_window
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.pictures import open_rgb
from chatbind_cli.media.root import MediaRoot
from chatbind_cli.media.source import MediaSource, open_source
from chatbind_cli.media.video import open_film

if TYPE_CHECKING:
    from PIL import Image

_LONGEST_SIDE = 640
_FILM_SECONDS = 20
_FILM_RATE = 25
_SOUND_SECONDS = 60
_SOUND_RATE_HZ = 16_000
_SOUND_BITS_PER_SECOND = 64_000
_MOTION_SECONDS, _MOTION_STEPS = 5, 2000
"""The window that models see."""
_PLOT_WIDTH, _PLOT_HEIGHT = 500, 90
"""Size of one panel of curves, in SVG units."""
_PLOT_PIECES = 125


class Scale(NamedTuple):
    """What false colours mean: the palette's name, and what its two ends stand for."""

    colours: str
    low: str
    high: str


class Panel(NamedTuple):
    """Curves over the same five seconds."""

    title: str
    """What is measured, with its unit."""
    curves: list[tuple[str, str]]
    """x, y and z, each with its points as SVG writes them."""
    low: float
    high: float
    """The values at the lower and the upper edge."""


class Preview(NamedTuple):
    """One medium as the page shows it."""

    tag: str = ""
    """`img`, `audio`, `video`, `curves`, or nothing where only the name is shown."""
    uri: str = ""
    """Its data, as an address that holds them."""
    note: str = ""
    """How to tell the curves apart, or why it is not shown."""
    panels: tuple[Panel, ...] = ()
    seconds: Sequence[int] = ()
    """Marks on the axis below the curves."""
    scale: Scale | None = None
    key: str = ""
    """The id of the page's block with the `uri`."""


class Previews:
    """Finds media, turns them into previews, and keeps within a limit.

    Args:
        root: where the media lie.
        limit_bytes: most bytes of media in one page.

    Attributes:
        kept: the addresses that hold data by their keys, for the page's end.
    """

    def __init__(self, root: MediaRoot, *, limit_bytes: int = 64_000_000) -> None:
        self.kept: dict[str, str] = {}
        self._root = root
        self._left = limit_bytes
        self._known: dict[tuple[str, str], Preview] = {}
        self._failed: list[str] = []
        self._left_out = 0

    @property
    def problems(self) -> list[str]:
        """What is not shown and why, in a line each."""
        lines = []
        if self._failed:
            lines.append(f"{len(self._failed)} media cannot be shown; {self._failed[0]}")
        if self._left_out:
            lines.append(f"{self._left_out} media go beyond --media-limit and are only named")
        return lines

    def show(self, modality: str, name: str) -> Preview:
        """The preview of a file, always the same one."""
        if (modality, name) not in self._known:
            self._known[modality, name] = self._made(modality, name)
        return self._known[modality, name]

    def _made(self, modality: str, name: str) -> Preview:
        if self._left > 0:
            try:
                preview = preview_of(open_source(self._root.find(name)), modality)
            except Exception as error:
                failure = contained(error, where=name)
                self._failed.append(str(failure))
                return Preview(note=f"cannot be shown: {failure.what}")
            if not preview.uri:
                return preview
            if len(preview.uri) <= self._left:
                key = f"media-{len(self.kept) + 1}"
                self._left -= len(preview.uri)
                self.kept[key] = preview.uri
                return preview._replace(key=key)
        self._left_out += 1
        return Preview(note="beyond the report's media limit")


def preview_of(source: MediaSource, modality: str, options: MediaOptions | None = None) -> Preview:
    """Makes one medium ready to be seen or heard, as it is read with some options.

    Raises:
        MediaError: it cannot be read as what it is said to be.
    """
    makers: dict[str, Callable[[MediaSource, MediaOptions], Preview]] = {
        "image": _picture,
        "depth": _depth,
        "thermal": _heat,
        "audio": _sound,
        "video": _film,
        "imu": _motion,
    }
    return makers[modality](source, options or MediaOptions())


def _shown(tag: str, kind: str, data: bytes, scale: Scale | None = None) -> Preview:
    uri = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return Preview(tag=tag, uri=uri, scale=scale)


def _saved(picture: Image.Image, form: str, **options: Any) -> bytes:
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def _picture(source: MediaSource, options: MediaOptions) -> Preview:
    with open_rgb(source, options.max_pixels) as picture:
        return _shown("img", "image/jpeg", _saved(picture, "JPEG", quality=82))


def _depth(source: MediaSource, options: MediaOptions) -> Preview:
    # estimators that write 8 bits make near bright
    with open_depth(source, options, small="relative") as (numbers, unit):
        values = numbers.astype(np.float64)
    if unit != "m":
        return _coloured(values, Scale("turbo", "dark", "bright (no unit)"))
    near, far = np.nanpercentile(values, [2, 98])
    return _coloured(-values, Scale("turbo", f"far, {far:.2f} m", f"near, {near:.2f} m"))


def _heat(source: MediaSource, options: MediaOptions) -> Preview:
    with open_map(source, options) as stored:
        return _coloured(stored.astype(np.float64), Scale("inferno", "cold", "warm"))


def _coloured(values: npt.NDArray[np.float64], scale: Scale) -> Preview:
    """Values in false colour; what is no number is transparent."""
    from matplotlib import colormaps
    from PIL import Image

    known = np.isfinite(values)
    low, high = np.percentile(values[known], [2, 98]) if known.any() else (0.0, 1.0)
    scaled = np.clip((values - low) / (high - low if high > low else 1.0), 0, 1)
    painted = colormaps[scale.colours](np.where(known, scaled, 0.0), bytes=True)  # [h, w, 4]
    painted[..., 3] = np.where(known, 255, 0)
    data = _saved(Image.fromarray(painted), "PNG", optimize=True)
    return _shown("img", "image/png", data, scale)


def _sound(source: MediaSource, options: MediaOptions) -> Preview:
    """The first channel, as the model hears it."""
    most = _SOUND_SECONDS * _SOUND_RATE_HZ
    (waveform,) = read_stretches(
        source, _SOUND_RATE_HZ, lambda n: [(0, min(n, most))], longest_s=_SOUND_SECONDS
    )
    samples = (waveform.clamp(-1, 1).numpy() * np.iinfo(np.int16).max).astype(np.int16)
    frame = av.AudioFrame.from_ndarray(samples[None], format="s16p", layout="mono")
    frame.sample_rate = _SOUND_RATE_HZ
    target = io.BytesIO()
    with av.open(target, "w", format="mp3") as out:
        coded = out.add_stream("libmp3lame", rate=_SOUND_RATE_HZ, layout="mono")
        coded.bit_rate = _SOUND_BITS_PER_SECOND
        out.mux(coded.encode(frame))
        out.mux(coded.encode(None))
    return _shown("audio", "audio/mpeg", target.getvalue())


def _film(source: MediaSource, options: MediaOptions) -> Preview:
    """The first seconds, at most 25 frames of each."""
    target = io.BytesIO()
    with (
        open_film(source, options.max_pixels) as film,
        av.open(target, "w", format="mp4") as out,
    ):
        coded = out.add_stream("libx264", rate=_FILM_RATE)
        width, height = film.stream.width, film.stream.height
        scale = min(1.0, _LONGEST_SIDE / max(width, height, 1))
        # Even numbers, as the codec wants.
        coded.width, coded.height = (max(2, round(n * scale / 2) * 2) for n in (width, height))
        coded.pix_fmt = "yuv420p"
        coded.options = {"crf": "26", "preset": "veryfast"}
        coded.codec_context.thread_count = 1
        last = -1
        for frame, seconds in film.frames():
            place = round(seconds * _FILM_RATE)
            if place >= _FILM_SECONDS * _FILM_RATE:
                break
            if place > last:
                small = frame.reformat(width=coded.width, height=coded.height, format="yuv420p")
                small.pts, small.time_base, last = place, Fraction(1, _FILM_RATE), place
                out.mux(coded.encode(small))
        if last < 0:
            raise MediaError("holds no moving pictures", where=source.name)
        out.mux(coded.encode(None))
    return _shown("video", "video/mp4", target.getvalue())


def _motion(source: MediaSource, options: MediaOptions) -> Preview:
    seconds, steps = _MOTION_SECONDS, _MOTION_STEPS
    window = read_window(source, options, seconds=seconds, steps=steps).astype(np.float64)
    panels = (_panel("acceleration, m/s²", window[:3]), _panel("turning, rad/s", window[3:]))
    note = "solid x, dashed y, dotted z"
    return Preview(tag="curves", panels=panels, seconds=range(seconds + 1), note=note)


def _panel(title: str, rows: npt.NDArray[np.float64]) -> Panel:
    low, high = float(rows.min()), float(rows.max())
    # The lowest and the highest of each stretch, so that no tap is lost in the drawing.
    pieces = rows.reshape(3, _PLOT_PIECES, -1)
    values = np.stack([pieces.min(axis=2), pieces.max(axis=2)], axis=2).reshape(3, -1)
    across = np.linspace(0, _PLOT_WIDTH, values.shape[1])
    down = _PLOT_HEIGHT * (high - values) / (high - low if high > low else 1.0)
    curves = [
        (name, " ".join(f"{x:.0f},{y:.1f}" for x, y in zip(across, heights, strict=True)))
        for name, heights in zip("xyz", down, strict=True)
    ]
    return Panel(title, curves, round(low, 2), round(high, 2))

"""Videos: their frames, and the first and the last frame of stretches of them.

Of a recording of any length only a few frames are looked at: the decoder seeks to each stretch and
stops at its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from chatbind_cli.errors import MediaError
from chatbind_cli.media.container import (
    declared_seconds,
    decoded,
    frame_times,
    measured_seconds,
    open_container,
    refuse_cut_short,
    rewind,
    seek_before,
    start_seconds,
    video_streams,
)
from chatbind_cli.media.frame_budget import SMALL_PIXELS, WHOLE_PIXELS, FrameBudget
from chatbind_cli.media.guard import decoding
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import MediaSource

_WIDEST = 40
"""Frames longer than this many times their width are refused: they are no camera's."""

_NEAR = Fraction(1, 1_000_000)
"""Time stamps are rounded to the container's clock; so near is equal."""

_WORTH_A_SEEK = Fraction(3, 2)
"""Seconds to the next stretch from which seeking is cheaper than decoding on."""

_NO_FRAME = "holds no video frame that can be decoded"

T = TypeVar("T")
Cut = Callable[[float], Sequence[tuple[Fraction, Fraction]]]
"""From the seconds of a video to start and end of each stretch, of which the end is not in it."""


class Film(NamedTuple):
    """An opened video, and what its frames may take."""

    container: InputContainer
    stream: VideoStream
    source: MediaSource
    budget: FrameBudget
    max_pixels: int

    def frames(self) -> Iterator[tuple[VideoFrame, Fraction]]:
        """Frames from here on in order of display, with their time from the stream's start."""
        origin = start_seconds(self.stream)
        rate = self.stream.average_rate or Fraction(25)
        self.budget.flushed()
        for count, frame in enumerate(decoded(self.container, self.stream, self.budget.sent)):
            self.budget.received(frame)
            _check_size(frame.width, frame.height, self.source, self.max_pixels)
            time = count / rate
            if frame.pts is not None and frame.time_base is not None:
                time = Fraction(frame.pts * frame.time_base - origin)
            yield frame, time


@contextmanager
def open_film(source: MediaSource, max_pixels: int) -> Iterator[Film]:
    """Opens a video; inside the block there is room for its frames.

    Args:
        source: the file.
        max_pixels: of a frame, width times height.

    Raises:
        MediaError: it holds no video, is broken, or its frames have more than `max_pixels` pixels,
            or more than the budget allows.
    """
    with open_container(source) as container:
        streams = video_streams(container)
        if not streams:
            raise MediaError("holds no video", where=source.name)
        stream = streams[0]
        _check_size(stream.codec_context.width, stream.codec_context.height, source, max_pixels)
        budget = FrameBudget(stream, source.name)
        most = min(max_pixels, budget.pixels)
        stream.codec_context.options = {"max_pixels": str(most)}
        stream.codec_context.thread_count = 1  # every further thread holds further frames
        with decoding(budget.cost, source.name):
            yield Film(container, stream, source, budget, max_pixels)


def read_ends(
    source: MediaSource, cut: Cut, see: Callable[[npt.NDArray[np.uint8]], T], *, max_pixels: int
) -> list[tuple[T, T]]:
    """Reads the first and the last frame of each stretch.

    Rotation metadata is honoured. A video shorter than a stretch gives its first and last frame; a
    video of one frame shows it twice; where nothing changes during a whole stretch, the frame on
    display is taken. Frames of more than 9 million pixels are first scaled down to a quarter of
    that by the mean of areas.

    Args:
        source: the file.
        cut: where the stretches lie.
        see: makes of a frame, [height, width, 3] of RGB, what is kept: large frames of many
            stretches would fill the memory.
        max_pixels: of a frame, width times height.

    Raises:
        MediaError: it is cut short, or see `open_film`.
    """
    with open_film(source, max_pixels) as film:
        container, stream = film.container, film.stream
        declared = declared_seconds(container, stream)
        duration = declared if declared is not None else measured_seconds(container, stream)
        seen = _seen(see)
        ends = _look(film, cut(float(duration or 0)), seen)
        if declared is not None and None in ends:  # its header may be wrong
            duration = measured_seconds(container, stream)
            refuse_cut_short(container, source, declared, duration or Fraction(0))
            ends = _look(film, cut(float(duration or 0)), seen)
        return _all_of(ends, source)


def read_frames(
    source: MediaSource,
    options: MediaOptions,
    choose: Callable[[int, float], Iterable[int]],
    see: Callable[[npt.NDArray[np.uint8]], T],
) -> list[T]:
    """Reads some frames of a film, or of its stretch between `start` and `end`, as `read_ends`.

    Args:
        source: the file.
        options: where the stretch lies, and `max_pixels` of a frame.
        choose: from the number of frames there, and the seconds that they last, to the numbers of
            those to read.
        see: as there.

    Raises:
        MediaError: as there, or the film ends before the stretch.
    """
    with open_film(source, options.max_pixels) as film:
        container, stream = film.container, film.stream
        ticks, unit, end = frame_times(container, stream)
        if not len(ticks):
            raise MediaError(_NO_FRAME, where=source.name)
        refuse_cut_short(container, source, declared_seconds(container, stream), end * unit)
        seconds = np.multiply(ticks, float(unit), dtype=np.float64)
        begun, over = options.stretch(float(end * unit), source.name)
        # of a stretch between two frames the one that is on display
        first = max(int(np.searchsorted(seconds, begun, side="right")) - 1, 0)
        last = max(int(np.searchsorted(seconds, over)) - 1, first)
        total = last - first + 1
        chosen = choose(total, total * float(end * unit) / len(ticks))
        starts = [int(ticks[first + n]) * unit for n in chosen]
        cuts = [(start, start + _NEAR * 2) for start in starts]
        return [frame for frame, _ in _all_of(_look(film, cuts, _seen(see)), source)]


@dataclass
class _Stretch(Generic[T]):
    """What has been seen of one stretch so far; `early` is the frame on display when it starts."""

    start: Fraction
    end: Fraction
    see: Callable[[VideoFrame], T]
    early: VideoFrame | None = None
    first: T | None = None
    last: VideoFrame | None = None
    sought: bool = False
    ends: tuple[T, T] | None = None

    def add(self, frame: VideoFrame, time: Fraction) -> None:
        if self.ends is not None:
            return
        if time > self.end - _NEAR:
            self.finish()
        elif time < self.start - _NEAR:
            self.early = frame
        else:
            if self.first is None:
                self.first, self.early = self.see(frame), None
            self.last = frame

    def finish(self) -> None:
        """Looks at the last frame too."""
        frame = self.last or self.early
        if self.ends is None and frame is not None:
            last = self.see(frame)
            self.ends = (last if self.first is None else self.first, last)
            self.early = self.first = self.last = None


def _seen(see: Callable[[npt.NDArray[np.uint8]], T]) -> Callable[[VideoFrame], T]:
    """Stretches overlap: the frame looked at last is often looked at again."""
    return lru_cache(maxsize=1)(lambda frame: see(_upright_rgb(frame)))


def _all_of(ends: Sequence[tuple[T, T] | None], source: MediaSource) -> list[tuple[T, T]]:
    found = [pair for pair in ends if pair is not None]
    if len(found) < len(ends):
        raise MediaError(_NO_FRAME, where=source.name)
    return found


def _look(
    film: Film, stretches: Sequence[tuple[Fraction, Fraction]], see: Callable[[VideoFrame], T]
) -> list[tuple[T, T] | None]:
    """The ends of each stretch; None where the video ends before it."""
    views = [_Stretch(start, end, see) for start, end in stretches]
    rewind(film.container)
    last_seen = step = Fraction(0)
    jumping = True
    while jumping:
        jumping = False
        for frame, time in film.frames():
            step, last_seen = abs(time - last_seen), time
            for view in views:
                view.add(frame, time)
            waiting = [view for view in views if view.ends is None]
            if not waiting:
                return [view.ends for view in views]
            start = _worth_a_seek(waiting, time)
            if start is not None:
                seek_before(film.container, film.stream, start_seconds(film.stream) + start)
                jumping = True
                break
    for view in views:
        # at the end of the file: a stretch that begins after the last frame was shown has none
        if view.first is not None or view.start <= last_seen + max(2 * step, Fraction(1, 5)):
            view.finish()
    return [view.ends for view in views]


def _worth_a_seek(waiting: Iterable[_Stretch[T]], time: Fraction) -> Fraction | None:
    """Where to jump to now, if no stretch is being looked at and the next one is far enough."""
    upcoming = min(waiting, key=lambda view: view.start)
    if upcoming.sought or upcoming.start <= time + _WORTH_A_SEEK:
        return None
    for view in waiting:
        # one jump for all stretches that start there: a second one could go in circles
        view.sought = view.sought or view.start == upcoming.start
    return upcoming.start


def _check_size(width: int, height: int, source: MediaSource, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise MediaError("has video frames without a size", where=source.name)
    if width * height > max_pixels:
        raise MediaError(
            f"has frames of {width} x {height}, more than {max_pixels:,} pixels",
            where=source.name,
            hint="raise --max-pixels",
        )
    if max(width, height) > _WIDEST * min(width, height):
        raise MediaError(f"has frames of {width} x {height}: too narrow", where=source.name)


def _upright_rgb(frame: VideoFrame) -> npt.NDArray[np.uint8]:
    small: dict[str, Any] = {}
    if frame.width * frame.height > WHOLE_PIXELS:
        step = math.ceil(math.sqrt(frame.width * frame.height / SMALL_PIXELS))
        small = {
            "width": frame.width // step,
            "height": frame.height // step,
            "interpolation": "AREA",
        }
    rgb: npt.NDArray[Any] = frame.to_ndarray(format="rgb24", **small)
    quarter_turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(rgb, quarter_turns)) if quarter_turns else rgb

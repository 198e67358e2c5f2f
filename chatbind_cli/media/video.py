"""Moving pictures -> the encoder's clip tensor.

Of a recording of any length only a few frames are looked at: the decoder seeks to each clip and
stops at its end. What happens to the frames afterwards follows ImageBind's evaluation transform.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch.nn import functional

from chatbind_cli.errors import MediaError
from chatbind_cli.media.budget import decoding
from chatbind_cli.media.clips import Clip, spread_clips
from chatbind_cli.media.container import (
    declared_seconds,
    decoded,
    measured_seconds,
    open_container,
    refuse_cut_short,
    rewind,
    seek_before,
    start_seconds,
    video_streams,
)
from chatbind_cli.media.frames import SMALL_PIXELS, WHOLE_PIXELS, FrameBudget
from chatbind_cli.media.modality import CLIP_MEAN, CLIP_STD, IMAGE_SIZE, VIDEO_CROPS
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import MediaSource

_WIDEST = 40
"""Frames longer than this many times their width are refused: they are no camera's."""

_NEAR = Fraction(1, 1_000_000)
"""Time stamps are rounded to the container's clock; so near is equal."""

_WORTH_A_SEEK = Fraction(3, 2)
"""Seconds to the next clip from which seeking is cheaper than decoding on."""


def load_video(source: MediaSource, options: MediaOptions) -> torch.Tensor:
    """Reads a few clips of a video: of each its first and last frame, each frame in three crops.

    The short side is scaled to 224 (bilinear, in floating point), colours get CLIP's mean and
    deviation, and the crops are left, centre and right (top, centre and bottom of an upright
    video). Rotation metadata is honoured. A video shorter than a clip gives equal clips of its
    first and last frame; a video of one frame shows it twice; where nothing changes during a whole
    clip, the frame on display is taken. Frames of more than 9 million pixels are first scaled down
    to a quarter of that by the mean of areas.

    Returns:
        [clips * 3 crops, 3 colours, 2 frames, 224, 224] float32, clip by clip.

    Raises:
        MediaError: it holds no video, is broken or cut short, or its frames have more than
            `options.max_pixels` pixels, or more than the budget allows.

    Source: ImageBind (Girdhar et al., 2023), `load_and_transform_video_data`.
    """
    with open_container(source) as container:
        streams = video_streams(container)
        if not streams:
            raise MediaError("holds no video", where=source.name)
        stream = streams[0]
        _check_size(stream.codec_context.width, stream.codec_context.height, source, options)
        budget = FrameBudget(stream, source.name)
        most = min(options.max_pixels, budget.pixels)
        stream.codec_context.options = {"max_pixels": str(most)}
        stream.codec_context.thread_count = 1  # every further thread holds further frames
        with decoding(budget.cost, source.name):
            views = _sample(_Film(container, stream, source, budget), options)
    return torch.cat([view.tensor() for view in views])


class _Film(NamedTuple):
    """An opened video, and the count of its frames."""

    container: InputContainer
    stream: VideoStream
    source: MediaSource
    budget: FrameBudget


@dataclass
class _View:
    """What has been seen of one clip so far; `early` is the frame on display when it starts.

    Of its first frame only the crops are kept: large frames of many clips would fill the memory.
    """

    clip: Clip
    crops: Callable[[VideoFrame], torch.Tensor]
    early: VideoFrame | None = None
    first: torch.Tensor | None = None
    last: VideoFrame | None = None
    sought: bool = False
    done: bool = False
    cropped: torch.Tensor | None = None

    def see(self, frame: VideoFrame, time: Fraction) -> None:
        if self.done:
            return
        if time > self.clip.end - _NEAR:
            self.finish()
            return
        if time < self.clip.start - _NEAR:
            self.early = frame
            return
        if self.first is None:
            self.first, self.early = self.crops(frame), None
        self.last = frame

    def finish(self) -> None:
        """Turns the last frame into crops too."""
        last = self.last or self.early
        if self.done or last is None:
            return
        end = self.crops(last)
        begin = self.first if self.first is not None else end
        self.cropped = torch.stack([begin, end], dim=2)  # [crops, colours, frames, 224, 224]
        self.early = self.first = self.last = None
        self.done = True

    def tensor(self) -> torch.Tensor:
        assert self.cropped is not None
        return self.cropped


class _Crops:
    """The crops of frames; those of the one asked for last are remembered, as clips overlap."""

    def __init__(self) -> None:
        self._frame: VideoFrame | None = None
        self._crops: torch.Tensor | None = None

    def __call__(self, frame: VideoFrame) -> torch.Tensor:
        if self._crops is None or frame is not self._frame:
            self._frame, self._crops = frame, _three_crops(frame)
        return self._crops


def _sample(film: _Film, options: MediaOptions) -> list[_View]:
    """The clips of the video; a wrong length in the header is found out and measured."""
    container, stream, source, _ = film
    declared = declared_seconds(container, stream)
    duration = declared if declared is not None else measured_seconds(container, stream)
    views = _look(film, options, duration)
    if declared is not None and not all(view.done for view in views):
        duration = measured_seconds(container, stream)
        refuse_cut_short(container, source, declared, duration or Fraction(0))
        views = _look(film, options, duration)
    if not all(view.done for view in views):
        raise MediaError("holds no video frame that can be decoded", where=source.name)
    return views


def _look(film: _Film, options: MediaOptions, duration: Fraction | None) -> list[_View]:
    clips = spread_clips(
        float(duration or 0),
        count=options.video_clips,
        seconds=options.clip_seconds,
        sampler=options.clip_sampler,
    )
    crops = _Crops()
    views = [_View(clip, crops) for clip in clips]
    rewind(film.container)
    last_seen = Fraction(0)
    step = Fraction(0)
    moved: list[Fraction] = []  # the seek that the frame loop asks of the frame iterator
    for frame, time in _frames(film, moved):
        _check_size(frame.width, frame.height, film.source, options)
        step, last_seen = abs(time - last_seen), time
        for view in views:
            view.see(frame, time)
        if all(view.done for view in views):
            return views
        moved.extend(_next_seek(views, time))
    for view in views:
        # at the end of the file: a clip that begins after the last frame was shown has no frame
        if view.first is not None or view.clip.start <= last_seen + max(2 * step, Fraction(1, 5)):
            view.finish()
    return views


def _next_seek(views: Iterable[_View], time: Fraction) -> list[Fraction]:
    """Where to jump to now, if no clip is being looked at and the next one is far enough."""
    open_views = [view for view in views if not view.done]
    upcoming = min(open_views, key=lambda view: view.clip.start)
    if upcoming.sought or upcoming.clip.start <= time + _WORTH_A_SEEK:
        return []
    for view in open_views:
        # one jump for all clips that start there: a second one could go in circles
        view.sought = view.sought or view.clip.start == upcoming.clip.start
    return [upcoming.clip.start]


def _frames(film: _Film, moved: list[Fraction]) -> Iterator[tuple[VideoFrame, Fraction]]:
    """Frames in order of display with their time in seconds from the start of the stream.

    Entries put into `moved` make it jump to the key frame before that time.
    """
    container, stream, _, budget = film
    origin = start_seconds(stream)
    rate = stream.average_rate or Fraction(25)
    count = 0
    while True:
        budget.flushed()
        for frame in decoded(container, stream, budget.sent):
            if not isinstance(frame, VideoFrame):
                continue
            budget.received(frame)
            time = (
                frame.pts * frame.time_base - origin
                if frame.pts is not None and frame.time_base is not None
                else count / rate
            )
            count += 1
            yield frame, Fraction(time)
            if moved:
                seek_before(container, stream, origin + moved.pop())
                break
        else:
            return


def _check_size(width: int, height: int, source: MediaSource, options: MediaOptions) -> None:
    if width < 1 or height < 1:
        raise MediaError("has video frames without a size", where=source.name)
    if width * height > options.max_pixels:
        raise MediaError(
            f"has frames of {width} x {height}, more than {options.max_pixels:,} pixels",
            where=source.name,
            hint="raise --max-pixels",
        )
    if max(width, height) > _WIDEST * min(width, height):
        raise MediaError(f"has frames of {width} x {height}: too narrow", where=source.name)


def _three_crops(frame: VideoFrame) -> torch.Tensor:
    """One frame as the encoder wants it, [3 crops, 3 colours, 224, 224]."""
    small: dict[str, Any] = {}
    if frame.width * frame.height > WHOLE_PIXELS:
        step = math.ceil(math.sqrt(frame.width * frame.height / SMALL_PIXELS))
        small = {
            "width": frame.width // step,
            "height": frame.height // step,
            "interpolation": "AREA",
        }
    rgb: npt.NDArray[np.generic] = frame.to_ndarray(format="rgb24", **small)
    quarter_turns = round(frame.rotation / 90) % 4
    if quarter_turns:
        rgb = np.ascontiguousarray(np.rot90(rgb, quarter_turns))
    height, width = rgb.shape[:2]
    if width < height:
        size = (math.floor(height / width * IMAGE_SIZE), IMAGE_SIZE)
    else:
        size = (IMAGE_SIZE, math.floor(width / height * IMAGE_SIZE))
    pixels = torch.from_numpy(rgb).permute(2, 0, 1).to(torch.float32).div_(255)
    scaled = functional.interpolate(pixels[None], size=size, mode="bilinear", align_corners=False)
    mean = torch.tensor(CLIP_MEAN)[:, None, None]
    std = torch.tensor(CLIP_STD)[:, None, None]
    coloured = (scaled[0] - mean) / std
    spare = max(size) - IMAGE_SIZE
    crops = []
    for offset in (0, math.ceil(spare / 2), spare)[:VIDEO_CROPS]:
        top, left = (offset, 0) if size[0] > size[1] else (0, offset)
        crops.append(coloured[:, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE])
    return torch.stack(crops)

"""Which stretches of a recording are looked at: clips of equal length, spread over its duration.

Seconds go in and seconds come out. Exact fractions are used throughout, as the reference does, so
that a start never falls on the other side of a frame or sample by rounding.
"""

from __future__ import annotations

from fractions import Fraction

from chatbind_cli.errors import UsageError
from chatbind_cli.media.options import MOST_CLIPS, MediaOptions


def clips_of(
    duration: float, options: MediaOptions, count: int, where: str, *, frames: bool = False
) -> list[tuple[Fraction, Fraction]]:
    """Where the clips of a recording lie, by the options.

    Args:
        duration: seconds of the whole recording.
        options: `clip_seconds`, `clip_sampler`, and the stretch from `start` to `end` that the
            clips lie in, as if it were the whole.
        count: how many clips.
        where: the recording's name.
        frames: whether `fps` decides how many there are, in place of `count`.

    Raises:
        MediaError: the recording ends before the stretch begins.
        UsageError: see `spread_clips`.
    """
    start, end = options.stretch(duration, where)
    if frames and options.fps is not None:
        count = min(max(round((end - start) * options.fps / 2), 1), MOST_CLIPS)
    clips = spread_clips(
        end - start, count=count, seconds=options.clip_seconds, sampler=options.clip_sampler
    )
    if options.end is None and not start:
        return clips
    first, last = Fraction(start), Fraction(end)
    return [(first + begin, min(first + finish, last)) for begin, finish in clips]


def spread_clips(
    duration: float, *, count: int, seconds: float, sampler: str = "imagebind"
) -> list[tuple[Fraction, Fraction]]:
    """Spreads `count` clips of `seconds` each over a recording of `duration` seconds.

    With slack = max(duration - seconds, 0), clip i starts at

    - `imagebind`: slack * i / (count - 1), so the last clip ends with the recording (a single clip
      starts at 0);
    - `chatbind`: slack * i / count, which leaves the end unseen; the published ChatBind weights
      were made with it;
    - `pytorchvideo`: wherever that library's `ConstantClipsPerVideoSampler` puts it.

    A recording no longer than one clip gives `count` equal clips that all start at 0. The end of a
    clip is not in it; of a recording shorter than a clip, it lies past the recording's end.

    Raises:
        UsageError: the sampler's library is not installed.

    Source: ImageBind's pinned pytorchvideo 6cdc929, and pytorchvideo 0.1.5 as released.
    """
    if sampler == "pytorchvideo":
        return _library_clips(duration, count, seconds)
    slack = Fraction(max(duration - seconds, 0.0))
    steps = max(count - 1, 1) if sampler == "imagebind" else count
    starts = [slack * i / steps for i in range(count)]
    return [(start, start + Fraction(seconds)) for start in starts]


def _library_clips(duration: float, count: int, seconds: float) -> list[tuple[Fraction, Fraction]]:
    try:
        from pytorchvideo.data.clip_sampling import (  # noqa: PLC0415
            ConstantClipsPerVideoSampler,
        )
    except ImportError as error:
        raise UsageError(
            "the clip sampler `pytorchvideo` needs the library of that name",
            hint="pip install 'chatbind[pytorchvideo]', or take the sampler `chatbind`: "
            "it gives the same clips",
        ) from error
    sampler = ConstantClipsPerVideoSampler(clip_duration=seconds, clips_per_video=count)
    clips = []
    end: Fraction | float = 0.0
    last = False
    while not last:
        start, end, _, _, last = sampler(end, duration, None)
        clips.append((Fraction(start), Fraction(end)))
    return clips

"""Stretches of a sound as waveforms of one sampling rate.

Takes any container that has sound, a video's too. A short recording is decoded whole; of a long one
only the needed stretches are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torchaudio.functional
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer

from chatbind_cli.errors import MediaError
from chatbind_cli.media.container import (
    audio_streams,
    declared_seconds,
    decoded,
    measured_seconds,
    open_container,
    refuse_cut_short,
    seek_before,
    start_seconds,
)
from chatbind_cli.media.guard import decoding
from chatbind_cli.media.source import MediaSource

_WHOLE_SECONDS = 120
"""Recordings up to this long are decoded whole; the two ways differ by rounding only."""

_WHOLE_SAMPLES = 24_000_000
"""Most samples that are decoded whole: at 96 kHz four minutes."""

_RATES_HZ = range(1_000, 768_001)
_MOST_CHANNELS = 256
_MOST_FRAME_SAMPLES = 2**24
"""Most samples of one packet, those of all channels together."""

_MOST_ENTRIES = 4_000_000
"""Of the resampler's table: room for the rates of films slowed down for television (47,952 Hz)."""

_FORMATS = frozenset({"u8", "s16", "s32", "flt", "dbl"})
"""Sample formats that are read; a `p` at the end says that each channel lies by itself."""

_BASE_BYTES = 96 * 2**20
_SAMPLE_BYTES = 16
"""Bytes that a sample takes on its way from decoder to resampler."""

_NOTHING = "holds no sound that can be decoded"

Samples = npt.NDArray[np.float32]

Cut = Callable[[int], Sequence[tuple[int, int]]]
"""From the number of samples of a recording to the first and end sample of each stretch."""


def read_stretches(
    source: MediaSource, rate_hz: int, cut: Cut, *, longest_s: float
) -> list[torch.Tensor]:
    """Reads stretches of the first channel of a sound.

    Args:
        source: the file.
        rate_hz: samples a second that come out.
        cut: where the stretches lie, at that rate.
        longest_s: seconds of the longest of them.

    Returns:
        Float32 samples in [-1, 1], one tensor a stretch.

    Raises:
        MediaError: it holds no sound, is broken or cut short, has samples that are no numbers, or
            its decoding would take more than the budget allows.
    """
    with open_container(source) as container:
        streams = audio_streams(container)
        if not streams:
            raise MediaError("holds no sound", where=source.name)
        stream = streams[0]
        channels = stream.codec_context.channels
        if channels > _MOST_CHANNELS:
            raise MediaError(f"has {channels} channels", where=source.name)
        stream.codec_context.options = {"max_samples": str(_MOST_FRAME_SAMPLES)}
        stream.codec_context.thread_count = 1
        most = _most_samples(container, stream, longest_s)
        with decoding(_BASE_BYTES + _SAMPLE_BYTES * most, source.name):
            stretches = _Sound(container, stream, source, most, rate_hz, cut).stretches()
    if not all(stretch.isfinite().all() for stretch in stretches):
        raise MediaError("holds samples that are no numbers (NaN or infinity)", where=source.name)
    return stretches


def _most_samples(container: InputContainer, stream: AudioStream, longest_s: float) -> int:
    """Room for twice the stated sampling rate: that of HE-AAC is half the real one."""
    declared = declared_seconds(container, stream)
    seconds = _WHOLE_SECONDS if declared is None else min(float(declared), _WHOLE_SECONDS)
    longest = max(1.5 * seconds + 10, longest_s + 2)
    return min(_WHOLE_SAMPLES, math.ceil(longest) * 2 * max(stream.codec_context.sample_rate, 8000))


class _Clock(NamedTuple):
    """Samples per second, and the time stamp in seconds of the first one.

    Both are taken from the first decoded frame: headers are wrong about the rate of HE-AAC and know
    nothing of the samples that a decoder drops.
    """

    rate: int
    origin: Fraction

    @classmethod
    def of(cls, frame: AudioFrame, stream: AudioStream) -> _Clock:
        if frame.pts is None or frame.time_base is None:
            return cls(frame.sample_rate, start_seconds(stream))
        return cls(frame.sample_rate, Fraction(frame.pts * frame.time_base))


class _Ratio(NamedTuple):
    """How many samples of the file (`old`) last as long as `new` samples of what comes out."""

    old: int
    new: int

    @classmethod
    def of(cls, rate: int, rate_hz: int) -> _Ratio:
        # The resampler's table has old * new entries, so an odd rate (44,099 Hz) takes the nearest
        # small fraction, wrong by two millionths at most
        ratio = Fraction(rate_hz, rate)
        if ratio.numerator * ratio.denominator > _MOST_ENTRIES:
            ratio = ratio.limit_denominator(1_000)
        return cls(old=ratio.denominator, new=ratio.numerator)

    @property
    def margin(self) -> int:
        """Samples of the file on each side that touch a resampled value, rounded up generously."""
        return 16 * max(1, math.ceil(self.old / self.new)) + 16

    def resample(self, samples: Samples) -> torch.Tensor:
        waveform = torch.from_numpy(samples)
        if self.old == self.new:
            return waveform
        return torchaudio.functional.resample(waveform[None], self.old, self.new)[0]


@dataclass(frozen=True)
class _Sound:
    """An opened recording, what is wanted of it, and for how many samples at once there is room."""

    container: InputContainer
    stream: AudioStream
    source: MediaSource
    most: int
    rate_hz: int
    cut: Cut

    def stretches(self) -> list[torch.Tensor]:
        """What is wanted, each [samples]."""
        container, stream = self.container, self.stream
        declared = declared_seconds(container, stream)
        if declared is None or declared <= _WHOLE_SECONDS:
            samples, clock = self._decode_all()
            if samples is not None:
                found = Fraction(len(samples), clock.rate)
                refuse_cut_short(container, self.source, declared, found)
                waveform = _Ratio.of(clock.rate, self.rate_hz).resample(samples)
                return [waveform[start:end] for start, end in self.cut(len(waveform))]
            declared = None  # longer than it says, or it does not say
        else:
            # of a fresh container: after a jump back the encoder's delay would be heard
            frame = next(self._frames(), None)
            if frame is None:
                raise MediaError(_NOTHING, where=self.source.name)
            clock = _Clock.of(frame, stream)
        stretches = self._cut_long(clock, declared or measured_seconds(container, stream))
        if stretches is None:
            duration = measured_seconds(container, stream)
            refuse_cut_short(container, self.source, declared, duration or Fraction(0))
            stretches = self._cut_long(clock, duration)
        if stretches is None:
            raise MediaError("ends before its length says", where=self.source.name)
        return stretches

    def _cut_long(self, clock: _Clock, duration: Fraction | None) -> list[torch.Tensor] | None:
        """The stretches of a long recording; None: it ends before the last one."""
        if duration is None:
            raise MediaError("does not say how long it is", where=self.source.name)
        ratio = _Ratio.of(clock.rate, self.rate_hz)
        length = round(duration * clock.rate)
        stretches = []
        for start, end in self.cut(math.ceil(length * ratio.new / ratio.old)):
            # whole periods of the resampler's phase: the values equal those of the whole file
            block = max(start // ratio.new - ratio.margin // ratio.old - 1, 0)
            first = block * ratio.old
            last = min(math.ceil(end / ratio.new) * ratio.old + ratio.margin, length)
            samples = self._decode_stretch(clock, first, last)
            if samples is None:
                return None
            offset = block * ratio.new
            stretches.append(ratio.resample(samples)[start - offset : end - offset].clone())
        return stretches

    def _decode_all(self) -> tuple[Samples | None, _Clock]:
        """All samples of a fresh container; None: there are far more than a short one has."""
        parts: list[Samples] = []
        count = 0
        clock: _Clock | None = None
        for frame in self._frames():
            clock = clock or _Clock.of(frame, self.stream)
            parts.append(_first_channel(frame, self.source))
            count += len(parts[-1])
            if count > min(2 * _WHOLE_SECONDS * clock.rate, self.most):
                return None, clock
        if not count or clock is None:
            raise MediaError(_NOTHING, where=self.source.name)
        return np.concatenate(parts), clock

    def _decode_stretch(self, clock: _Clock, first: int, last: int) -> Samples | None:
        """Samples `first` to `last` of the stream; None: it ends before.

        Holes (broken packets) are silence.
        """
        rate = clock.rate
        if last - first > self.most:
            raise MediaError(f"has {rate:,} samples per second, unsaid", where=self.source.name)
        # lossy codecs need some packets before the first good sample
        target = max(Fraction(first, rate) - Fraction(1, 2), Fraction(0)) + clock.origin
        seek_before(self.container, self.stream, target)
        stretch = np.zeros(last - first, dtype=np.float32)
        position: int | None = None
        for frame in self._frames():
            samples = _first_channel(frame, self.source)
            if frame.pts is not None and frame.time_base is not None:
                stamped = round((frame.pts * frame.time_base - clock.origin) * rate)
                # coarse clocks (Matroska: 1 ms) jitter, so only a real jump moves the position
                if position is None or abs(stamped - position) > rate // 50:
                    position = stamped
            position = position or 0
            begin, end = max(position, first), min(position + len(samples), last)
            if begin < end:
                stretch[begin - first : end - first] = samples[begin - position : end - position]
            position += len(samples)
            if position >= last:
                return stretch
        # the last few samples may be missing where the length was rounded
        near_enough = position is not None and position >= last - rate // 10
        return stretch if near_enough else None

    def _frames(self) -> Iterator[AudioFrame]:
        """Decoded frames from the current position on, all of one rate."""
        rate: int | None = None
        for frame in decoded(self.container, self.stream):
            if frame.sample_rate not in _RATES_HZ:
                raise MediaError(
                    f"has {frame.sample_rate} samples per second", where=self.source.name
                )
            if rate is not None and frame.sample_rate != rate:
                raise MediaError("changes its sampling rate midway", where=self.source.name)
            rate = frame.sample_rate
            yield frame


def _first_channel(frame: AudioFrame, source: MediaSource) -> Samples:
    """The left (or only) channel in [-1, 1], [samples]."""
    kind = frame.format.name
    if kind.removesuffix("p") not in _FORMATS:
        raise MediaError(
            f"holds samples of the kind {kind}, which is not read",
            where=source.name,
            hint="save it with 16 or 32 bits a sample",
        )
    values = frame.to_ndarray()
    if frame.format.is_planar:
        channel = values[0]
    else:
        channel = values.reshape(-1)[:: frame.layout.nb_channels]
    if channel.dtype.kind == "f":
        with np.errstate(over="ignore"):  # infinity is found out later
            return channel.astype(np.float32)
    if channel.dtype == np.uint8:
        return (channel.astype(np.float32) - 128) / 128
    return (channel / -float(np.iinfo(channel.dtype).min)).astype(np.float32)

"""Sounds -> the encoder's log-mel tensor.

Takes any container that has sound, a video's too. A short recording is decoded whole; of a long one
only the needed stretches are. The numbers follow ImageBind's evaluation transform.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torchaudio.functional
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from torchaudio.compliance import kaldi

from chatbind_cli.errors import MediaError
from chatbind_cli.media.budget import decoding
from chatbind_cli.media.clips import spread_clips
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
from chatbind_cli.media.modality import AUDIO_FRAMES, AUDIO_MEL_BINS, AUDIO_RATE_HZ
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import MediaSource

_MEAN, _STD = -4.268, 9.138
"""AudioSet's statistics of log-mel energies, as ImageBind uses them (AST: Gong et al., 2021)."""

_WHOLE_SECONDS = 120
"""Recordings up to this long are decoded whole; the two ways differ by rounding only."""

_WINDOW_SAMPLES = 400
"""One 25 ms window at 16 kHz."""

_WHOLE_SAMPLES = 24_000_000
"""Most samples that are decoded whole: at 96 kHz four minutes."""

_RATES_HZ = range(1_000, 768_001)
_MOST_CHANNELS = 256
_MOST_FRAME_SAMPLES = 2**24
"""Most samples of one packet, those of all channels together."""

_FORMATS = frozenset({"u8", "s16", "s32", "flt", "dbl"})
"""Sample formats that are read; a `p` at the end says that each channel lies by itself."""

_BASE_BYTES = 96 * 2**20
_SAMPLE_BYTES = 16
"""Bytes that a sample takes on its way from decoder to resampler."""

Samples = npt.NDArray[np.float32]


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


class _Sound(NamedTuple):
    """An opened recording, and how many of its samples there is room for at a time."""

    container: InputContainer
    stream: AudioStream
    source: MediaSource
    most: int


class _Ratio(NamedTuple):
    """How many samples of the file (`old`) last as long as `new` samples of 16 kHz."""

    old: int
    new: int

    @property
    def margin(self) -> int:
        """Samples of the file on each side that touch a resampled value, rounded up generously."""
        return 16 * max(1, math.ceil(self.old / self.new)) + 16


def load_audio(source: MediaSource, options: MediaOptions) -> torch.Tensor:
    """Reads a few clips of a sound, each as 128 log-mel energies every 10 ms.

    The first channel is resampled to 16 kHz; each clip loses its mean and goes through Kaldi's
    filter bank (25 ms Hann windows every 10 ms, HTK's mel scale, no dither), is cut or padded to
    204 steps and standardised with AudioSet's statistics. Padding comes after the end and has the
    log energy 0. A recording shorter than a clip gives equal clips of all of it; one shorter than a
    window of 25 ms is first extended with silence to one window.

    Returns:
        [clips, 1, 128, 204] float32.

    Raises:
        MediaError: it holds no sound, is broken or cut short, has samples that are no numbers, or
            its decoding would take more than the budget allows.

    Source: ImageBind (Girdhar et al., 2023), `load_and_transform_audio_data`, without its removal
    of the mean in place, which marks the borders of overlapping clips.
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
        sound = _Sound(container, stream, source, _most_samples(container, stream, options))
        with decoding(_BASE_BYTES + _SAMPLE_BYTES * sound.most, source.name):
            clips = [_log_mel(waveform, source) for waveform in _clip_waveforms(sound, options)]
    return torch.stack(clips)


def _most_samples(container: InputContainer, stream: AudioStream, options: MediaOptions) -> int:
    """Room for twice the stated sampling rate: that of HE-AAC is half the real one."""
    declared = declared_seconds(container, stream)
    seconds = _WHOLE_SECONDS if declared is None else min(float(declared), _WHOLE_SECONDS)
    longest = max(1.5 * seconds + 10, options.clip_seconds + 2)
    return min(_WHOLE_SAMPLES, math.ceil(longest) * 2 * max(stream.codec_context.sample_rate, 8000))


def _log_mel(waveform: torch.Tensor, source: MediaSource) -> torch.Tensor:
    """[samples] at 16 kHz -> [1, 128, 204]."""
    if not waveform.isfinite().all():
        raise MediaError("holds samples that are no numbers (NaN or infinity)", where=source.name)
    if len(waveform) < _WINDOW_SAMPLES:
        waveform = torch.nn.functional.pad(waveform, (0, _WINDOW_SAMPLES - len(waveform)))
    bank = kaldi.fbank(
        (waveform - waveform.mean())[None],
        htk_compat=True,
        sample_frequency=AUDIO_RATE_HZ,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=AUDIO_MEL_BINS,
        dither=0.0,
        frame_length=25,
        frame_shift=10,
    )
    steps = bank.T[:, :AUDIO_FRAMES]
    padded = torch.nn.functional.pad(steps, (0, AUDIO_FRAMES - steps.shape[1]))
    return (padded[None] - _MEAN) / _STD


def _clip_waveforms(sound: _Sound, options: MediaOptions) -> list[torch.Tensor]:
    """The clips at 16 kHz, each [samples]."""
    container, stream, source, _ = sound
    declared = declared_seconds(container, stream)
    short = declared is None or declared <= _WHOLE_SECONDS
    samples, clock = _decode_all(sound) if short else (None, None)
    if samples is not None and clock is not None:
        refuse_cut_short(container, source, declared, Fraction(len(samples), clock.rate))
        return _cut_whole(samples, clock.rate, options)
    if clock is None:
        clock = _clock(sound)
    else:
        declared = None  # longer than it says, or it does not say
    duration = declared or measured_seconds(container, stream)
    clips = _cut_long(sound, clock, duration, options)
    if clips is None:
        duration = measured_seconds(container, stream)
        refuse_cut_short(container, source, declared, duration or Fraction(0))
        clips = _cut_long(sound, clock, duration, options)
    if clips is None:
        raise MediaError("ends before its length says", where=source.name)
    return clips


def _slices(total: int, options: MediaOptions) -> list[tuple[int, int]]:
    """First and end sample of each clip of a recording of `total` samples at 16 kHz."""
    clips = spread_clips(
        total / AUDIO_RATE_HZ,
        count=options.audio_clips,
        seconds=options.clip_seconds,
        sampler=options.clip_sampler,
    )
    return [
        (int(clip.start * AUDIO_RATE_HZ), min(int(clip.end * AUDIO_RATE_HZ), total))
        for clip in clips
    ]


def _ratio(rate: int) -> _Ratio:
    # The resampler's table has old * new entries, so an odd rate (44,099 Hz) takes the nearest
    # small fraction, wrong by less than a millionth
    ratio = Fraction(AUDIO_RATE_HZ, rate).limit_denominator(1_000)
    return _Ratio(old=ratio.denominator, new=ratio.numerator)


def _resample(samples: Samples, rate: int) -> torch.Tensor:
    ratio = _ratio(rate)
    waveform = torch.from_numpy(samples)
    if ratio.old == ratio.new:
        return waveform
    return torchaudio.functional.resample(waveform[None], ratio.old, ratio.new)[0]


def _cut_whole(samples: Samples, rate: int, options: MediaOptions) -> list[torch.Tensor]:
    waveform = _resample(samples, rate)
    return [waveform[start:end] for start, end in _slices(len(waveform), options)]


def _cut_long(
    sound: _Sound, clock: _Clock, duration: Fraction | None, options: MediaOptions
) -> list[torch.Tensor] | None:
    """The clips of a long recording; None: the recording ends before the last one."""
    if duration is None:
        raise MediaError("does not say how long it is", where=sound.source.name)
    ratio = _ratio(clock.rate)
    length = round(duration * clock.rate)
    clips = []
    for start, end in _slices(math.ceil(length * ratio.new / ratio.old), options):
        # whole periods of the resampler's phase, so that the values equal those of the whole file
        block = max(start // ratio.new - ratio.margin // ratio.old - 1, 0)
        first = block * ratio.old
        last = min(math.ceil(end / ratio.new) * ratio.old + ratio.margin, length)
        stretch = _decode_stretch(sound, clock, first, last)
        if stretch is None:
            return None
        offset = block * ratio.new
        clips.append(_resample(stretch, clock.rate)[start - offset : end - offset].clone())
    return clips


def _decode_all(sound: _Sound) -> tuple[Samples | None, _Clock]:
    """All samples of a fresh container; None: there are far more than a short recording has."""
    parts: list[Samples] = []
    count = 0
    clock: _Clock | None = None
    for frame in _frames(sound):
        clock = clock or _Clock.of(frame, sound.stream)
        parts.append(_first_channel(frame, sound.source))
        count += len(parts[-1])
        if count > min(2 * _WHOLE_SECONDS * clock.rate, sound.most):
            return None, clock
    if not count or clock is None:
        raise MediaError("holds no sound that can be decoded", where=sound.source.name)
    return np.concatenate(parts), clock


def _decode_stretch(sound: _Sound, clock: _Clock, first: int, last: int) -> Samples | None:
    """Samples `first` to `last` of the stream; None: it ends before.

    Holes (broken packets) are silence.
    """
    rate = clock.rate
    if last - first > sound.most:
        raise MediaError(f"has {rate:,} samples per second, unsaid", where=sound.source.name)
    # lossy codecs need some packets before the first good sample
    target = max(Fraction(first, rate) - Fraction(1, 2), Fraction(0)) + clock.origin
    seek_before(sound.container, sound.stream, target)
    stretch = np.zeros(last - first, dtype=np.float32)
    position: int | None = None
    for frame in _frames(sound):
        samples = _first_channel(frame, sound.source)
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


def _clock(sound: _Sound) -> _Clock:
    """The clock of a fresh container: after a jump back the encoder's delay would be heard."""
    for frame in _frames(sound):
        return _Clock.of(frame, sound.stream)
    raise MediaError("holds no sound that can be decoded", where=sound.source.name)


def _frames(sound: _Sound) -> Iterator[AudioFrame]:
    """Decoded frames from the current position on, all of one rate."""
    rate: int | None = None
    source = sound.source
    for frame in decoded(sound.container, sound.stream):
        if not isinstance(frame, AudioFrame):
            continue
        if frame.sample_rate not in _RATES_HZ:
            raise MediaError(f"has {frame.sample_rate} samples per second", where=source.name)
        if rate is not None and frame.sample_rate != rate:
            raise MediaError("changes its sampling rate midway", where=source.name)
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

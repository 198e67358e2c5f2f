"""Sounds -> the log-mel tensor of the audio tower: ImageBind's evaluation transform."""

from __future__ import annotations

import torch

from chatbind_cli.encoders.filter_bank import log_mel
from chatbind_cli.encoders.imagebind.clips import clips_of
from chatbind_cli.encoders.imagebind.config import AUDIO_FRAMES, AUDIO_MEL_BINS
from chatbind_cli.media.audio import read_stretches
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import MediaSource

RATE_HZ = 16_000

_MEAN, _STD = -4.268, 9.138
"""AudioSet's statistics of log-mel energies, as ImageBind uses them (AST: Gong et al., 2021)."""


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
        MediaError: see `media.audio.read_stretches`.

    Source: ImageBind (Girdhar et al., 2023), `load_and_transform_audio_data`, without its removal
    of the mean in place, which marks the borders of overlapping clips.
    """

    def cut(total: int) -> list[tuple[int, int]]:
        clips = clips_of(total / RATE_HZ, options, options.audio_clips, source.name)
        return [(int(start * RATE_HZ), min(int(end * RATE_HZ), total)) for start, end in clips]

    waveforms = read_stretches(source, RATE_HZ, cut, longest_s=options.clip_seconds)
    return torch.stack([_log_mel(waveform) for waveform in waveforms])


def _log_mel(waveform: torch.Tensor) -> torch.Tensor:
    """[samples] at 16 kHz -> [1, 128, 204]."""
    steps = log_mel(waveform, AUDIO_MEL_BINS, RATE_HZ)[:, :AUDIO_FRAMES]
    padded = torch.nn.functional.pad(steps, (0, AUDIO_FRAMES - steps.shape[1]))
    return (padded[None] - _MEAN) / _STD

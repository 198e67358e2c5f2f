"""Kaldi's log-mel filter bank, as encoders of sound see it: 25 ms Hann windows every 10 ms."""

from __future__ import annotations

import torch
from torchaudio.compliance import kaldi

_WINDOW_MS, _SHIFT_MS = 25, 10


def samples_of(steps: int, rate: int) -> int:
    """How many samples so many windows take, one 10 ms after the other."""
    return (steps - 1) * (rate * _SHIFT_MS // 1000) + rate * _WINDOW_MS // 1000


def steps_of(samples: int, rate: int) -> int:
    """How many windows fit into so many samples; one where none does."""
    return 1 + max(samples - samples_of(1, rate), 0) // (rate * _SHIFT_MS // 1000)


def log_mel(waveform: torch.Tensor, bins: int, rate: int) -> torch.Tensor:
    """The log energies of a sound without its mean; one shorter than a window gets silence.

    HTK's mel scale, no dither.

    Args:
        waveform: [samples].
        bins: how many.
        rate: samples a second.

    Returns:
        [bins, steps].
    """
    short = samples_of(1, rate) - len(waveform)
    if short > 0:
        waveform = torch.nn.functional.pad(waveform, (0, short))
    bank = kaldi.fbank(
        (waveform - waveform.mean())[None],
        htk_compat=True,
        sample_frequency=rate,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=bins,
        dither=0.0,
        frame_length=_WINDOW_MS,
        frame_shift=_SHIFT_MS,
    )
    return bank.T

"""Makers of real media files, so that every format that is read is also written by the tests."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

Film = Callable[..., bytes]
Sound = Callable[..., bytes]


def _film(
    container: str = "mp4",
    codec: str = "libx264",
    *,
    frames: int = 50,
    rate: int = 10,
    size: tuple[int, int] = (64, 48),
    pixels: str = "yuv420p",
    gop: int | None = None,
    milliseconds: Sequence[int] | None = None,
    draw: Callable[[int], np.ndarray] | None = None,
    **codec_options: str,
) -> bytes:
    """A film; frame i is grey of level 5 * i modulo 256, or `draw(i)`, [h, w, 3] uint8."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, options=codec_options)
        stream.width, stream.height = size
        stream.pix_fmt = pixels
        if gop:
            stream.codec_context.gop_size = gop
        for i in range(frames):
            grey = np.full((size[1], size[0], 3), 5 * i % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(draw(i) if draw else grey, format="rgb24")
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[i], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def _sound(
    container: str = "wav",
    codec: str = "pcm_s16le",
    *,
    samples: np.ndarray | None = None,
    seconds: float = 3.0,
    rate: int = 44_100,
    channels: int = 1,
) -> bytes:
    """A sound file; by default a rising tone with a little noise, so that every moment differs."""
    if samples is None:
        time = np.arange(int(seconds * rate)) / rate
        tone = 0.5 * np.sin(2 * np.pi * (200 * time + 80 * time**2))
        samples = tone + np.random.default_rng(0).normal(0, 0.02, len(time))
    layout = "mono" if channels == 1 else "stereo"
    planes = np.stack([samples] * channels).astype(np.float32)
    frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=layout)
    frame.sample_rate, frame.pts = rate, 0
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.codec_context.layout = layout
        resampler = av.AudioResampler(format=stream.format, layout=layout, rate=rate)
        queue = av.AudioFifo()
        for part in resampler.resample(frame):
            queue.write(part)
        size = stream.codec_context.frame_size or 1024
        while (part := queue.read(size)) is not None:
            output.mux(stream.encode(part))
        if (part := queue.read()) is not None:
            output.mux(stream.encode(part))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def image_file(picture: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """A picture's file."""
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(picture)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def npy(values: np.ndarray) -> bytes:
    """An array's file."""
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def film() -> Film:
    return _film


@pytest.fixture(scope="session")
def sound() -> Sound:
    return _sound


@pytest.fixture(scope="session")
def clip_greys() -> Callable[[torch.Tensor], list[list[float]]]:
    """The mean level (0 to 255) of first and last frame of each clip of a grey film."""

    def measure(tensor: torch.Tensor) -> list[list[float]]:
        red = tensor.reshape(-1, 3, 3, 2, 224, 224)[:, 1, 0] * 0.26862954 + 0.48145466
        return (red.mean(dim=(2, 3)) * 255).tolist()

    return measure

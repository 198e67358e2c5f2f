"""What PE-AV sees of media, made by its repository's own processors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PeAudioFeatureExtractor, PeVideoVideoProcessor

from chatbind_cli.encoders.huggingface.inputs import (
    AS_ARRAYS,
    LEAST_RATE_HZ,
    MOST_FRAMES,
    MOST_NUMBERS,
    WORK,
    read_sound,
    spread,
)
from chatbind_cli.encoders.huggingface.repository import open_processor
from chatbind_cli.errors import WeightsError
from chatbind_cli.media.guard import IMPORTING
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.pictures import open_rgb
from chatbind_cli.media.source import MediaSource
from chatbind_cli.model.pretrained import one_line

MOST_SECONDS = 30
"""Of a sound of any length."""


@dataclass(frozen=True)
class Reader:
    """Reads media for PE-AV; may be sent to other processes.

    Args:
        folder: the repository, whose processors are used.
        frames: of a film; 0: as many as there are, up to `MOST_FRAMES`.
        rate_hz: samples a second of sound.
    """

    folder: Path
    frames: int
    rate_hz: int

    def __call__(self, source: MediaSource, modality: str, options: MediaOptions) -> torch.Tensor:
        """Reads one medium.

        Returns:
            float32: image [3, height, width]; video [frames, 3, height, width]; audio
            [1, samples].

        Raises:
            MediaError: it cannot be read.
        """
        if modality == "image":
            with open_rgb(source, options.max_pixels, work=WORK) as picture:
                return self._see(np.array(picture))
        if modality == "video":
            with IMPORTING:  # a picture needs no FFmpeg
                from chatbind_cli.media.video import read_frames  # noqa: PLC0415

            choose = partial(self._choose, options)
            return torch.stack(read_frames(source, options, choose, self._see))
        waveform = read_sound(source, options, self.rate_hz, most_seconds=MOST_SECONDS)
        extractor = open_processor(self.folder, PeAudioFeatureExtractor)
        found = extractor(
            [waveform.numpy()], sampling_rate=self.rate_hz, padding=True, return_tensors="pt"
        )
        values: torch.Tensor = found["input_values"][0]
        return values.float()

    def _see(self, rgb: npt.NDArray[np.uint8]) -> torch.Tensor:
        """A frame [height, width, 3] as the tower sees it, [3, height, width]."""
        processor = open_processor(self.folder, PeVideoVideoProcessor)
        found = processor([rgb[None]], do_sample_frames=False, **AS_ARRAYS)
        pixels: torch.Tensor = found["pixel_values_videos"][0, 0]
        return pixels.float()

    def _choose(self, options: MediaOptions, total: int, seconds: float) -> list[int]:
        if self.frames:
            return spread(total, self.frames)
        wanted = total if options.fps is None else max(round(seconds * options.fps), 1)
        return spread(total, min(wanted, total, MOST_FRAMES))


def film_shape(folder: Path) -> tuple[int, int, int]:
    """How many frames of a film are asked for (0: it is not said), their height and width.

    Raises:
        CheckpointError: there is no video processor that can be used.
        WeightsError: it asks for too much, or for frames of any size.
    """
    processor = open_processor(folder, PeVideoVideoProcessor)
    with one_line("no usable processor", folder):
        frames = processor.num_frames if processor.do_sample_frames else None
        size = processor.crop_size if processor.do_center_crop else processor.size
        height, width = size["height"], size["width"]
        numbers = 3 * (frames or MOST_FRAMES) * height * width
        sized = processor.do_resize or processor.do_center_crop
        small = min(height, width) > 0 and numbers <= MOST_NUMBERS
        if sized and small and (frames is None or frames > 1):
            return frames or 0, height, width
    raise WeightsError(f"asks for {frames} frames of {height} x {width}", where=str(folder))


def sound_rate(folder: Path) -> int:
    """Samples a second of sound.

    Raises:
        CheckpointError: there is no feature extractor that can be used.
        WeightsError: it asks for what is no sound.
    """
    extractor = open_processor(folder, PeAudioFeatureExtractor)
    with one_line("no usable feature extractor", folder):
        rate, step = extractor.sampling_rate, extractor.hop_length
        if extractor.feature_size == 1 and 1 <= step <= rate and rate >= LEAST_RATE_HZ:
            return int(rate)
    raise WeightsError(
        f"asks for {extractor.feature_size} channels of {rate} Hz in steps of {step}",
        where=str(folder),
    )

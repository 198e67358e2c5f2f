"""What EmbeddingGemma 2 sees of media, made by its repository's own processors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoVideoProcessor,
    PreTrainedConfig,
)
from transformers.video_utils import VideoMetadata

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

_MOST_SAMPLES = 480_000
"""Of a sound; the feature extractor cuts there."""

_MOST_STEPS = 1000
"""That the tower of sound looks at at once, of 40 ms each."""

_KINDS = ("Gemma4", "EmbeddingGemma2")
"""How the names of processors begin that give what the towers take."""

_MOST_FPS = 60
_LOST_S = 0.0015
"""By which a film is measured too short whose times are whole milliseconds (WebM, Matroska)."""
_RATE_HZ, _FRAME_MS = 16_000, 20  # where a file does not say them
_MOST_BANK = 1 << 24
"""Numbers in the table of a filter bank."""


@dataclass(frozen=True)
class Reader:
    """Reads media for EmbeddingGemma 2; may be sent to other processes.

    Args:
        folder: the repository, whose processors are used.
        rate_hz: samples a second of sound.
    """

    folder: Path
    rate_hz: int

    def __call__(self, source: MediaSource, modality: str, options: MediaOptions) -> torch.Tensor:
        """Reads one medium.

        Returns:
            float32: image [rows, columns, numbers of a patch]; video [frames, rows, columns,
            numbers of a patch]; audio [steps, mel bins].

        Raises:
            MediaError: it cannot be read.
        """
        if modality == "image":
            with open_rgb(source, options.max_pixels, work=WORK) as picture:
                processor = open_processor(self.folder, AutoImageProcessor)
                found = processor([np.array(picture)], **AS_ARRAYS)
                return _grid(found["pixel_values"][0], found["image_position_ids"][0])
        if modality == "video":
            with IMPORTING:  # a picture needs no FFmpeg
                from chatbind_cli.media.video import read_frames  # noqa: PLC0415

            choose = partial(self._choose, options)
            return torch.stack(read_frames(source, options, choose, self._see))
        extractor = open_processor(self.folder, AutoFeatureExtractor)
        seconds = _MOST_SAMPLES / self.rate_hz
        waveform = read_sound(source, options, self.rate_hz, most_seconds=seconds)
        # a window and the sample after it: what is shorter gets silence
        short = extractor.frame_length // 2 + 1 - len(waveform)
        waveform = functional.pad(waveform, (0, max(short, 0)))
        found = extractor(
            [waveform.numpy()],
            sampling_rate=self.rate_hz,
            pad_to_multiple_of=None,
            return_tensors="pt",
        )
        bank: torch.Tensor = found["input_features"][0]
        return bank.float()

    def _see(self, rgb: npt.NDArray[np.uint8]) -> torch.Tensor:
        """The patches of a frame [height, width, 3]."""
        processor = open_processor(self.folder, AutoVideoProcessor)
        found = processor([rgb[None]], do_sample_frames=False, **AS_ARRAYS)
        return _grid(found["pixel_values_videos"][0], found["video_position_ids"][0])

    def _choose(self, options: MediaOptions, total: int, seconds: float) -> list[int]:
        """The numbers of the frames that the processor would look at."""
        processor = open_processor(self.folder, AutoVideoProcessor)
        if not processor.do_sample_frames and options.fps is None:
            return spread(total, min(total, MOST_FRAMES))
        fps = processor.fps if options.fps is None else min(options.fps, _MOST_FPS)
        chosen = processor.sample_frames(
            VideoMetadata(total, fps=total / seconds, duration=seconds + _LOST_S),
            fps=fps,
            max_frames=processor.max_frames,
            overflow_strategy=processor.overflow_strategy,
        )
        kept = spread(len(chosen), min(len(chosen), MOST_FRAMES))
        return [int(chosen[number]) for number in kept]


def _grid(patches: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Patches in their rows and columns without those that fill up the budget.

    Args:
        patches: [budget, numbers of a patch].
        positions: [budget, 2], column and row; -1 where there is none.
    """
    columns, rows = (positions.amax(dim=0) + 1).tolist()
    return patches[: rows * columns].reshape(rows, columns, -1).float()


def check_pictures(folder: Path, vision: PreTrainedConfig) -> None:
    """Refuses processors of pictures and films that make what the tower cannot take.

    Raises:
        CheckpointError: there is none that can be used.
        WeightsError: it asks for too much, or for what another tower takes.
    """
    films = open_processor(folder, AutoVideoProcessor)
    pictures = open_processor(folder, AutoImageProcessor)
    with one_line("no usable processor", folder):
        fps = 1 if films.fps is None else films.fps
        most = MOST_FRAMES if films.max_frames is None else films.max_frames
        unbounded = films.max_frames is None and films.overflow_strategy is not None
        if films.add_timestamps or unbounded or not 0 < fps <= _MOST_FPS or most < 1:
            raise WeightsError(
                f"asks for {fps} frames a second, for {films.max_frames} in all, "
                f"add_timestamps = {films.add_timestamps}"
            )
        for processor, frames in ((pictures, 1), (films, min(most, MOST_FRAMES))):
            _check_kind(processor)
            side, pooled = processor.patch_size, processor.pooling_kernel_size
            tokens = processor.max_soft_tokens
            fits = (side, pooled) == (vision.patch_size, vision.pooling_kernel_size)
            fits = fits and side > 0 and pooled > 0 and processor.do_resize is True
            # the longest picture is one soft token high
            fits = fits and tokens * pooled <= vision.position_embedding_size
            if not fits or frames * tokens * pooled**2 * 3 * side**2 > MOST_NUMBERS:
                raise WeightsError(
                    f"asks for {tokens} soft tokens of {pooled} x {pooled} patches of {side} x "
                    f"{side} pixels, which the tower does not take"
                )


def sound_rate(folder: Path, sounds: PreTrainedConfig, settings: Mapping[str, Any]) -> int:
    """Samples a second of sound.

    Args:
        folder: the repository.
        sounds: the config of its audio part.
        settings: what its files say.

    Raises:
        CheckpointError: there is no feature extractor that can be used.
        WeightsError: it asks for too much, or for what another tower takes.
    """
    with one_line("no usable feature extractor", folder):
        for file in settings.values():
            bank = file.get("feature_extractor", file)
            size = bank.get("feature_size", 0) * bank.get("sampling_rate", _RATE_HZ)
            if size * bank.get("frame_length_ms", _FRAME_MS) > 1000 * _MOST_BANK:
                raise WeightsError("asks for a huge filter bank")
        extractor = open_processor(folder, AutoFeatureExtractor)
        _check_kind(extractor)
        rate, step, frame = extractor.sampling_rate, extractor.hop_length, extractor.frame_length
        bins, noise = extractor.feature_size, extractor.dither
        # two convolutions leave a quarter of them
        fits = math.ceil(bins / 4) == sounds.subsampling_conv_channels[0] // 4
        around = (sounds.attention_context_left, sounds.attention_context_right)
        fits = fits and 1 <= sounds.attention_chunk_size <= _MOST_STEPS
        fits = fits and min(around) >= 0 and max(around) <= _MOST_STEPS
        fits = fits and rate >= LEAST_RATE_HZ and rate / 200 <= step <= frame <= rate / 10
        if fits and not noise:
            return int(rate)
    raise WeightsError(
        f"asks for {bins} bins of {frame} samples every {step} at {rate} Hz with noise of {noise}, "
        "which the tower does not take",
        where=str(folder),
    )


def _check_kind(processor: Any) -> None:
    """Refuses a processor of another model.

    Raises:
        WeightsError: it is one.
    """
    name = type(processor).__name__
    if not name.startswith(_KINDS):
        raise WeightsError(f"has a {name}, and none of its own")

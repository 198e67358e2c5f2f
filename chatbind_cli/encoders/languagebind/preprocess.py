"""From files to the tensors of LanguageBind's towers, by modality.

As the published weights saw media: pictures are resized without antialiasing (torchvision 0.14).
Where the reference draws at random, this does not: no film is mirrored, and of a long sound the
windows are its start, its middle and its end. EXIF orientation is honoured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from chatbind_cli.encoders.languagebind.config import VisionConfig
from chatbind_cli.encoders.pixels import (
    centre,
    fit_size,
    narrow_box,
    scale_frame,
    standardised,
)
from chatbind_cli.errors import MediaError
from chatbind_cli.media.guard import IMPORTING
from chatbind_cli.media.maps import is_npy, open_depth, open_heat
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.pictures import open_rgb
from chatbind_cli.media.source import MediaSource

_NEAREST_M = 0.01

_WIDEST = 40
"""Longer strips than this many times their width lose their ends, and half a pixel's place."""

_WORK = 10
"""Bytes a pixel for one colour as float32, beside the picture that it comes from."""


@dataclass(frozen=True)
class Reader:
    """Reads media for the towers of some modalities; may be sent to other processes."""

    towers: Mapping[str, VisionConfig]

    def __call__(self, source: MediaSource, modality: str, options: MediaOptions) -> torch.Tensor:
        """Reads one medium.

        Returns:
            float32: image, depth and thermal [3, size, size]; video [3, frames, size, size]; audio
            [3 windows, mel bins, steps].

        Raises:
            MediaError: it cannot be read.
        """
        load = _LOADERS[modality]
        return load(source, options, self.towers[modality])


def _image(source: MediaSource, options: MediaOptions, config: VisionConfig) -> torch.Tensor:
    """A picture: bicubic, the centre, CLIP's mean and deviation."""
    with open_rgb(source, options.max_pixels, work=_WORK) as whole:
        colours = (np.array(whole.getchannel(n)) for n in range(3))
        return _resized((torch.from_numpy(c).float().div_(255) for c in colours), config)


def _depth(source: MediaSource, options: MediaOptions, config: VisionConfig) -> torch.Tensor:
    """A map in metres, as a share of the largest depth; where nothing was measured, nearest."""
    with open_depth(source, options) as (numbers, unit):
        if unit == "relative":
            raise MediaError(
                "says no metres, which LanguageBind wants to know of depth", where=source.name
            )
        if unit == "disparity":
            with np.errstate(divide="ignore", invalid="ignore"):
                numbers = options.depth_baseline_m * options.depth_focal_px / numbers
        metres = torch.from_numpy(numbers).float().nan_to_num(0.0, posinf=0.0)
        most = config.max_depth or float(metres.max())
        return _resized([metres.clamp(_NEAREST_M, most) / most], config)


def _thermal(source: MediaSource, options: MediaOptions, config: VisionConfig) -> torch.Tensor:
    """As a picture; an array of heat as a grey one."""
    if not is_npy(source):
        return _image(source, options, config)
    with open_heat(source, options) as heat:
        return _resized([torch.from_numpy(heat)], config)


def _video(source: MediaSource, options: MediaOptions, config: VisionConfig) -> torch.Tensor:
    """Frames spread evenly from the first to the last; short films show some twice."""
    with IMPORTING:
        from chatbind_cli.media.video import read_frames  # noqa: PLC0415  a picture needs no FFmpeg

    size = config.image_size

    def see(rgb: npt.NDArray[np.uint8]) -> torch.Tensor:
        return centre(scale_frame(rgb, size), size)

    def choose(total: int, _: float) -> npt.NDArray[np.int64]:
        return np.linspace(0, total - 1, config.num_frames).astype(np.int64)

    frames = read_frames(source, options, choose, see)
    return torch.stack(frames, dim=1)


def _audio(source: MediaSource, options: MediaOptions, config: VisionConfig) -> torch.Tensor:
    """The filter bank of three windows, equal ones of a short sound, which is repeated in them."""
    with IMPORTING:
        from chatbind_cli.encoders.filter_bank import log_mel, samples_of, steps_of  # noqa: PLC0415
        from chatbind_cli.media.audio import read_stretches  # noqa: PLC0415

    rate, steps = config.audio_sample_rate, config.target_length
    longest = samples_of(steps, rate)

    def cut(total: int) -> list[tuple[int, int]]:
        first, last = options.stretch(total / rate, source.name)
        begin, end = int(first * rate), min(int(last * rate), total)
        spare = max(steps_of(end - begin, rate) - steps, 0)
        starts = [begin + n * (rate // 100) for n in (0, spare // 2, spare)]
        return [(start, min(start + longest, end)) for start in starts]

    windows = read_stretches(source, rate, cut, longest_s=longest / rate)
    banks = [log_mel(window, config.num_mel_bins, rate) for window in windows]
    repeated = [bank.repeat(1, -(-steps // bank.shape[1]))[:, :steps] for bank in banks]
    return (torch.stack(repeated) - config.audio_mean) / (2 * config.audio_std)


def _resized(planes: Iterable[torch.Tensor], config: VisionConfig) -> torch.Tensor:
    """Three colours or one plane, [height, width] in [0, 1] -> [3, size, size].

    What overshoots stays.
    """
    done = []
    for plane in planes:
        left, top, right, bottom = narrow_box(plane.shape[1], plane.shape[0], _WIDEST)
        part = plane[None, None, top:bottom, left:right]
        width, height = fit_size(right - left, bottom - top, config.image_size)
        resized = functional.interpolate(
            part, size=(height, width), mode="bicubic", align_corners=False
        )
        done.append(centre(resized[0, 0], config.image_size))
    return standardised(torch.stack(done)).contiguous()


_LOADERS = {
    "image": _image,
    "video": _video,
    "audio": _audio,
    "depth": _depth,
    "thermal": _thermal,
}

"""Motion recordings -> the 5 s tensor of the IMU tower.

ImageBind published no loader for motion; the window and the number of steps are the paper's.
"""

from __future__ import annotations

import numpy as np
import torch

from chatbind_cli.encoders.imagebind.config import IMU_SECONDS, IMU_STEPS
from chatbind_cli.errors import MediaError
from chatbind_cli.media.motion import Motion, Numbers, open_motion
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import MediaSource

_STEP_SECONDS = IMU_SECONDS / IMU_STEPS


def load_imu(source: MediaSource, options: MediaOptions) -> torch.Tensor:
    """Reads 5 s of motion: accelerometer x, y, z in m/s^2, then gyroscope x, y, z in rad/s.

    Of a longer recording the middle 5 s are taken, or those from `options.imu_start_seconds`; after
    the end of a shorter one the last reading is held. The window is resampled to 2000 steps of 2.5
    ms, linearly; a recording faster than that is averaged over each step, so that vibrations do not
    fold into slow motion. A recording of 2000 steps that does not say its rate is a ready window.

    Returns:
        [6, 2000] float32.

    Raises:
        MediaError: the rate is not known, the recording is too short, or see
            `media.motion.open_motion`.

    Source: ImageBind (Girdhar et al., 2023), section 4: 5 s windows of 2K time steps.
    """
    with open_motion(source, options) as motion:
        window = _resample(motion, options.imu_start_seconds, source)
        return torch.from_numpy(window.astype(np.float32))


def _resample(motion: Motion, start: float | None, source: MediaSource) -> Numbers:
    """The window, [6, 2000]."""
    channels, seconds = motion
    if seconds is None:
        if channels.shape[1] != IMU_STEPS:
            raise MediaError(
                "does not say its sampling rate",
                where=source.name,
                hint="say it with --imu-rate-hz",
            )
        seconds = np.arange(IMU_STEPS, dtype=np.float64) * _STEP_SECONDS
    if len(seconds) < 2:
        raise MediaError("holds fewer than two readings", where=source.name)
    rate = (len(seconds) - 1) / seconds[-1] if seconds[-1] > 0 else 0.0
    if rate <= 0:
        raise MediaError("has no usable time", where=source.name)
    length = seconds[-1] + 1 / rate
    if start is None:
        start = max(length - IMU_SECONDS, 0.0) / 2
    if start >= length:
        raise MediaError(
            f"is {length:.4g} s long: nothing is left from second {start:g} on", where=source.name
        )
    if rate * _STEP_SECONDS <= 1.01:
        wanted = start + np.arange(IMU_STEPS) * _STEP_SECONDS
        return np.stack([np.interp(wanted, seconds, row) for row in channels])
    # the mean over each step, from the running integral of the piecewise linear signal
    edges = np.asarray(start + (np.arange(IMU_STEPS + 1) - 0.5) * _STEP_SECONDS, np.float64)
    return np.stack([_means(edges, seconds, row) for row in channels])


def _means(edges: Numbers, seconds: Numbers, row: Numbers) -> Numbers:
    """Means between successive edges of the line through (seconds, row), held at both ends."""
    at_edges = np.interp(edges, seconds, row)
    times = np.concatenate([seconds, edges])
    values = np.concatenate([row, at_edges])
    order = np.argsort(times, kind="stable")
    times, values = times[order], values[order]
    areas = np.concatenate([[0.0], np.cumsum(np.diff(times) * (values[1:] + values[:-1]) / 2)])
    integral = np.interp(edges, times, areas)
    return np.diff(integral) / np.diff(edges)

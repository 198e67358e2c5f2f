"""Motion recordings -> the 5 s tensor of the IMU tower.

ImageBind published no loader for motion; the window and the number of steps are the paper's.
"""

from __future__ import annotations

import torch

from chatbind_cli.encoders.imagebind.config import IMU_SECONDS, IMU_STEPS
from chatbind_cli.media.motion import read_window
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import MediaSource


def load_imu(source: MediaSource, options: MediaOptions) -> torch.Tensor:
    """Reads 5 s of motion, in 2000 steps of 2.5 ms: see `media.motion.read_window`.

    Returns:
        [6, 2000] float32: accelerometer x, y, z in m/s^2, then gyroscope x, y, z in rad/s.

    Raises:
        MediaError: see `media.motion.read_window`.

    Source: ImageBind (Girdhar et al., 2023), section 4: 5 s windows of 2K time steps.
    """
    return torch.from_numpy(read_window(source, options, seconds=IMU_SECONDS, steps=IMU_STEPS))

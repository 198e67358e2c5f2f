"""The names of the six senses, and the sizes of the tensors that carry them.

It holds facts of ImageBind's published input format only; how a file becomes such a tensor is the
business of the loader modules beside it.
"""

from __future__ import annotations

MODALITIES: tuple[str, ...] = ("image", "video", "audio", "depth", "thermal", "imu")
"""Every modality that a media file can have. `text` is known to the encoder, not to this room."""

IMAGE_SIZE = 224
"""Height and width, in pixels, of image, video, depth and thermal tensors."""

VIDEO_FRAMES_PER_CLIP = 2
VIDEO_CROPS = 3

AUDIO_RATE_HZ = 16_000
AUDIO_MEL_BINS = 128
AUDIO_FRAMES = 204
"""Steps of 10 ms in one audio clip: 2 s of sound give 198 to 200, the rest is padding."""

IMU_CHANNELS = 6
IMU_STEPS = 2_000
IMU_SECONDS = 5.0

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Per-channel statistics of CLIP's training images, RGB in [0, 1] (Radford et al., 2021)."""

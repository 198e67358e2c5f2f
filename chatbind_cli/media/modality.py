"""The names of the modalities that a media file can have."""

from __future__ import annotations

MODALITIES: tuple[str, ...] = ("image", "video", "audio", "depth", "thermal", "imu")
"""`text` is known to the encoder alone."""

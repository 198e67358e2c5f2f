"""How large a toy world is made, and how long its models train.

Counts only; what is done with them is in `world`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

VERSION = 2
"""Raise this when the same seed gives another world."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """The extent of a world.

    Attributes:
        train_items: training items by modality; the first ones of the handwriting.
        heldout_items: held-out items of every modality; no training ever sees them.
        image_epochs: passes over the images for the image tower.
        bind_epochs: passes by modality for the towers that are bound to it.
        language_steps: batches of text for the language model.
    """

    train_items: Mapping[str, int]
    heldout_items: int
    image_epochs: int
    bind_epochs: Mapping[str, int]
    language_steps: int


FULL = Size(
    train_items={
        "image": 1597,
        "video": 120,
        "audio": 300,
        "depth": 1000,
        "thermal": 1000,
        "imu": 400,
    },
    heldout_items=100,
    image_epochs=20,
    bind_epochs={"audio": 12, "depth": 14, "thermal": 14, "imu": 22},
    language_steps=260,
)

QUICK = Size(
    train_items={"image": 64, "video": 8, "audio": 32, "depth": 32, "thermal": 32, "imu": 32},
    heldout_items=10,
    image_epochs=2,
    bind_epochs={"audio": 2, "depth": 2, "thermal": 2, "imu": 2},
    language_steps=4,
)
"""Everything in its place and nothing learned: for tests of the commands."""

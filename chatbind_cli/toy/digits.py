"""The ten digits and the handwriting that everything in the toy world is made from.

The scans are scikit-learn's `load_digits`: 1797 digits of 8x8 pixels (the test set of UCI's
"Optical Recognition of Handwritten Digits"), which come with the library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Held-out scans come in blocks that hold every digit equally often, so that the first one, two, ..
# blocks are balanced too.
HELDOUT_BLOCK = 100
HELDOUT_BLOCKS = 2

# One fixed shuffle for every seed: whichever world is made, the same scans are held out.
_SPLIT_SEED = 1797

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Item:
    """One digit that is shown in every modality under one number.

    Attributes:
        split: `train` or `heldout`.
        number: counts from 0 within the split.
        digit: 0 to 9.
        scan: the handwriting, float32 [8, 8], 0 is paper and 1 is ink.
    """

    split: Split
    number: int
    digit: int
    scan: npt.NDArray[np.float32]

    @property
    def stem(self) -> str:
        """The file name without its ending; it does not tell the digit."""
        return f"{self.split}-{self.number:04d}"


def load_items() -> tuple[list[Item], list[Item]]:
    """The 1597 training and the 200 held-out items, each in a fixed shuffled order."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - slow to load

    bunch = load_digits()
    scans = (bunch.images / 16.0).astype(np.float32)
    digits = bunch.target.astype(int)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(digits))
    heldout = _balanced_blocks(order, digits)
    kept_out = set(heldout)
    train = [index for index in order.tolist() if index not in kept_out]
    return (
        [Item("train", n, int(digits[i]), scans[i]) for n, i in enumerate(train)],
        [Item("heldout", n, int(digits[i]), scans[i]) for n, i in enumerate(heldout)],
    )


def _balanced_blocks(order: npt.NDArray[np.int64], digits: npt.NDArray[np.int64]) -> list[int]:
    """Indices of the held-out scans: blocks of ten of every digit, each block in shuffled order."""
    rng = np.random.default_rng(_SPLIT_SEED + 1)
    each = HELDOUT_BLOCK // len(NAMES)
    chosen: list[int] = []
    for block in range(HELDOUT_BLOCKS):
        rows = [order[digits[order] == k][block * each : (block + 1) * each] for k in range(10)]
        chosen.extend(rng.permutation(np.concatenate(rows)).tolist())
    return chosen

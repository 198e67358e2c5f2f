"""Finished weights and deltas told apart by their norm weights.

Published deltas carry no word of what they are. But the norm weights of a finished model are
positive nearly all, most of them near one, and those of a delta lie around zero. That is a few
megabytes to look at; what cannot be told from them is not said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from chatbind_cli.checkpoints.checkpoint import Checkpoint, open_checkpoint
from chatbind_cli.checkpoints.manifest import read_manifest
from chatbind_cli.errors import CheckpointError, WeightsError

_NORMS = ("norm.weight", "norm1.weight", "norm2.weight", "ln_f.weight", "ln_1.weight")
# Their norms multiply by one plus the weight, so finished weights are around zero, too.
_CENTRED_KINDS = ("gemma", "qwen3_next")
_FEWEST_ELEMENTS = 16
_SMALL = 0.02  # root mean square; LLaMA's smallest layer is above, any delta's norms below
_LARGE = 0.25  # mean; no training moves norm weights so far
_MIXED = 0.7  # share of positive elements: a delta's are about a half
_POSITIVE = 0.95


def refuse_unapplied(folder: Path) -> None:
    """Refuses a model folder whose weights are a delta that was never added to its base.

    Raises:
        CheckpointError: it is one.
    """
    try:
        with open_checkpoint(folder) as checkpoint:
            named = read_manifest(folder).get("kind") == "delta"
            unapplied = named or _seems(checkpoint) == "a delta"
    except (CheckpointError, WeightsError):
        return  # what is missing or broken is for the loader to tell
    if unapplied:
        raise CheckpointError(
            "is a delta, not a model"
            if named
            else "looks like a delta that was never applied (its norm weights are around zero)",
            where=str(folder),
            hint="add it to its base with `chatbind apply-delta` first",
        )


def refuse_mistaken(base: Checkpoint, delta: Checkpoint) -> None:
    """Refuses a base that looks like a delta, and a delta that looks like finished weights.

    Raises:
        WeightsError: one of them does.
    """
    if _seems(base) == "a delta":
        raise WeightsError(
            "looks like a delta (its norm weights are around zero), and a base is wanted",
            where=str(base.path),
            hint="are the two swapped?",
        )
    if _seems(delta) == "finished":
        raise WeightsError(
            "looks like finished weights, not like a delta (its norm weights are not around zero)",
            where=str(delta.path),
            hint="was it applied already?",
        )


def _seems(checkpoint: Checkpoint) -> Literal["a delta", "finished"] | None:
    """What the norm weights say; None where they say neither, or are zero by design."""
    kind = str((checkpoint.config.get("text_config") or checkpoint.config).get("model_type", ""))
    norms = [
        checkpoint.read(name).float()
        for name, info in checkpoint.tensors.items()
        if name.endswith(_NORMS) and len(info.shape) == 1 and info.dtype.is_floating_point
    ]
    values = torch.cat([torch.empty(0), *norms])
    if values.numel() < _FEWEST_ELEMENTS or kind.startswith(_CENTRED_KINDS):
        return None
    mean, size = float(values.mean()), float(values.square().mean().sqrt())
    positive = float((values > 0).float().mean())
    if size < _SMALL or (abs(mean) < 0.25 * size and positive < _MIXED):
        return "a delta"
    if mean > _LARGE and positive > _POSITIVE:
        return "finished"
    return None

"""Finished weights and differences of weights told apart by what their numbers look like.

Published deltas carry no word of what they are. Two things give them away. The norm weights of a
finished model are around one and nearly all positive; those of a delta are around zero. And a
fine-tuned model is its base plus something small that hardly depends on the base: so the slope of
a true delta over its base is about 0, that of finished weights over their base about 1, and that
of a base over a delta that it has in it already about 1, too.

All of it looks at a few megabytes; what cannot be told from those is not said.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from chatbind_cli.errors import CheckpointError, WeightsError
from chatbind_cli.weights.checkpoint import Checkpoint, open_checkpoint
from chatbind_cli.weights.delta import Plan, Step
from chatbind_cli.weights.identity import read_passport
from chatbind_cli.weights.threads import one_thread

_NORMS = ("norm.weight", "norm1.weight", "norm2.weight", "ln_f.weight", "ln_1.weight")
# Their norms multiply by one plus the weight, so finished weights are around zero, too.
_CENTRED_KINDS = ("gemma", "qwen3_next")
_SMALLEST_NORM = 0.02
_FEWEST_NORM_ELEMENTS = 16

_SAMPLED_TENSORS = 9
_SAMPLED_ELEMENTS = 1 << 17
_FEWEST_ELEMENTS = 1000
_TOLERANCE = 0.25
_SIGMAS = 5.0


def looks_like_difference(checkpoint: Checkpoint) -> bool:
    """Whether the norm weights of a checkpoint are around zero; False where there are none."""
    kind = str((checkpoint.config.get("text_config") or checkpoint.config).get("model_type", ""))
    if kind.startswith(_CENTRED_KINDS):
        return False
    names = [
        name
        for name, info in checkpoint.tensors.items()
        if name.endswith(_NORMS) and len(info.shape) == 1 and info.dtype.is_floating_point
    ]
    if not names:
        return False
    values = torch.cat([checkpoint.read(name).float() for name in names])
    if values.numel() < _FEWEST_NORM_ELEMENTS:
        return False
    size = float(values.square().mean().sqrt())
    positive = float((values > 0).float().mean())
    centred = abs(float(values.mean())) < 0.25 * size
    return size < _SMALLEST_NORM or (centred and positive < 0.7)


def refuse_unapplied(folder: Path) -> None:
    """Refuses a folder whose weights are a delta that was never added to its base.

    Raises:
        CheckpointError: it is one.
    """
    hint = "add it to its base with `chatbind apply-delta` first"
    try:
        if read_passport(folder).get("kind") == "delta":
            raise CheckpointError("is a delta, not a model", where=str(folder), hint=hint)
        with open_checkpoint(folder) as checkpoint:
            unapplied = looks_like_difference(checkpoint)
    except CheckpointError as error:
        if error.hint == hint:
            raise
        return  # what is missing is for the loader to tell
    except WeightsError:
        return  # and so is what is broken is for the loader to tell
    if unapplied:
        raise CheckpointError(
            "looks like a delta that was never applied (its norm weights are around zero)",
            where=str(folder),
            hint=hint,
        )


def refuse_misfit(plan: Plan, base: Checkpoint, delta: Checkpoint) -> None:
    """Refuses to add a delta that is none, or that the base has in it already.

    Raises:
        WeightsError: base or delta does not look like one.
    """
    if looks_like_difference(base):
        raise WeightsError(
            "looks like a delta (its norm weights are around zero), and a base is wanted",
            where=str(base.path),
            hint="are the two swapped?",
        )
    with one_thread():
        pairs = [_pair(step, base, delta) for step in _sampled(plan)]
        forward = [_slope(ours, theirs) for theirs, ours in pairs]
        backward = [_slope(theirs, ours) for theirs, ours in pairs]
    if _is_about_one(forward):
        raise WeightsError(
            "looks like finished weights over this base, not like a delta",
            where=str(delta.path),
            hint="was it applied already?",
        )
    if _is_about_one(backward):
        raise WeightsError(
            f"looks as if {delta.path} had been applied to it already",
            where=str(base.path),
            hint="give the base as it was before",
        )


def _sampled(plan: Plan) -> Sequence[Step]:
    steps = [
        step
        for step in plan.steps
        if step.base is not None
        and len(step.info.shape) > 1
        and step.info.dtype.is_floating_point
        and step.overlap >= _FEWEST_ELEMENTS
    ]
    return steps[:: max(1, len(steps) // _SAMPLED_TENSORS)]


def _pair(step: Step, base: Checkpoint, delta: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
    """A stretch of the base's and of the delta's numbers, from the middle of the tensor."""
    count = min(step.overlap, _SAMPLED_ELEMENTS)
    start = (step.overlap - count) // 2
    theirs = base.read_flat(step.base or step.name, start, start + count).double()
    ours = delta.read_flat(step.name, start, start + count).double()
    finite = theirs.isfinite() & ours.isfinite()
    return theirs[finite], ours[finite]


def _slope(y: torch.Tensor, x: torch.Tensor) -> tuple[float, float] | None:
    """Slope of `y` over `x` through the origin, and its standard error were the two unrelated."""
    square = float(x.dot(x))
    if square == 0:
        return None
    return float(x.dot(y)) / square, (float(y.dot(y)) / square / x.numel()) ** 0.5


def _is_about_one(slopes: Sequence[tuple[float, float] | None]) -> bool:
    """Whether the typical slope is one, and far enough from zero not to be chance."""
    known = [slope for slope in slopes if slope is not None]
    if not known:
        return False
    slope = statistics.median(slope for slope, _ in known)
    # A median of k values is about 1.25 / sqrt(k) as uncertain as one of them.
    error = statistics.median(error for _, error in known) * 1.25 / len(known) ** 0.5
    return abs(slope - 1) < _TOLERANCE and slope > _SIGMAS * error

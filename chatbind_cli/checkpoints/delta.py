"""How a delta, its base and its target fit together, and how they are told apart.

`fit` looks at names, shapes and dtypes only and refuses what it does not understand by name.
The arithmetic is the published one: the sum in the delta's dtype, rows beyond the base's
vocabulary and the projector from the delta alone.

Published deltas carry no word of what they are, so deltas and finished weights are told apart by
their norm weights: a few megabytes to look at.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from chatbind_cli.checkpoints.checkpoint import WORD_EMBEDDINGS, Checkpoint, open_checkpoint
from chatbind_cli.checkpoints.manifest import is_rotary, read_manifest
from chatbind_cli.checkpoints.safetensors_file import TensorInfo
from chatbind_cli.errors import CheckpointError, WeightsError

# A model folder of our own holds the language model's tensors under this prefix.
OWN_PREFIX = "language_model."
_GROWING = (*WORD_EMBEDDINGS, "lm_head.weight", "lm_head.bias", "embed_out.weight")
_PROJECTOR = re.compile(r"(^|\.)(mm_)?projector\.")
_SUMMABLE = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
)

# Of finished weights the norm weights are positive nearly all, most of them near one; those of a
# delta lie around zero. What is between the two is not told.
_NORMS = ("norm.weight", "norm1.weight", "norm2.weight", "ln_f.weight", "ln_1.weight")
# Their norms multiply by one plus the weight, so finished weights are around zero, too.
_CENTRED_KINDS = ("gemma", "qwen3_next")
_FEWEST_ELEMENTS = 16
_SMALL = 0.02  # root mean square; LLaMA's smallest layer is above, any delta's norms below
_LARGE = 0.25  # mean; no training moves norm weights so far
_MIXED = 0.7  # share of positive elements: a delta's are about a half
_POSITIVE = 0.95


@dataclass(frozen=True, slots=True)
class Step:
    """What becomes of one tensor of the delta (or of the target, when a delta is made).

    Attributes:
        name: its name in delta and target.
        info: its shape and dtype in delta and target.
        base: the name of the base's tensor that it is summed with; None where it stands alone.
        overlap: number of leading elements that the base has too; the rest stands alone.
        rotary: a buffer of rotary frequencies: the base's in a target, zero in a delta.
    """

    name: str
    info: TensorInfo
    base: str | None = None
    overlap: int = 0
    rotary: bool = False


def fit(base: Checkpoint, other: Checkpoint) -> tuple[dict[str, Step], list[str]]:
    """Fits a base to a delta or a target.

    Args:
        base: the language model that everything is relative to.
        other: the delta to apply, or the target to make a delta of: the same rules hold.

    Returns:
        The step of each tensor of the result, in the order of the other's files, and what the user
        should know about tensors that are not in the result.

    Raises:
        WeightsError: a tensor of either has no place; the message names it.
    """
    _refuse_mix_up(base)
    steps = {name: step for name in other.tensors if (step := _step(name, base, other)) is not None}
    used = {step.base for step in steps.values()}
    tied = other.text_config.get("tie_word_embeddings")
    notes = []
    for name in base.tensors:
        if name in used or is_rotary(name):
            continue
        if not (tied and name.endswith("lm_head.weight")):
            raise WeightsError(
                f"tensor {name} is in the base but not in {other.path}",
                where=str(base.path),
                hint="do the two belong together?",
            )
        notes.append(f"{name} of the base is not in the result: it is tied to the input matrix")
    dropped = (base.tensors.keys() - used) | (other.tensors.keys() - steps.keys())
    if any(map(is_rotary, dropped)):
        notes.append("rotary_emb.inv_freq is not in the result: loaders compute it from the config")
    return steps, notes


def _refuse_mix_up(base: Checkpoint) -> None:
    if read_manifest(base.folder).get("kind") == "delta":
        raise WeightsError(
            "is a delta, and a base is wanted", where=str(base.path), hint="are the two swapped?"
        )
    for name in base.tensors:
        if _PROJECTOR.search(name):
            raise WeightsError(
                f"has a projector already ({name}), so it is not a base language model",
                where=str(base.path),
                hint="give the model that the delta was made over, such as LLaMA-7B",
            )


def _step(name: str, base: Checkpoint, other: Checkpoint) -> Step | None:
    """None for a rotary buffer that the base does not have: a delta's own is spoiled by rounding.

    Raises:
        WeightsError: the tensor has no place in the result.
    """
    info = other.tensors[name]
    partner = _counterpart(name, base)
    if is_rotary(name):
        if partner is None or base.tensors[partner].shape != info.shape:
            return None
        return Step(name, info, base=partner, overlap=info.numel, rotary=True)
    if partner is None:
        if _PROJECTOR.search(name):
            return Step(name, info)
        raise WeightsError(
            f"tensor {name} is neither in the base nor part of a projector",
            where=str(other.path),
            hint=f"is {base.path} the right base?",
        )
    theirs = base.tensors[partner]
    if info.dtype not in _SUMMABLE or theirs.dtype not in _SUMMABLE:
        raise WeightsError(
            f"tensor {name} cannot be summed: {theirs.dtype} in the base, {info.dtype} here",
            where=str(other.path),
        )
    if info.dtype.is_floating_point != theirs.dtype.is_floating_point:
        raise WeightsError(
            f"tensor {name} is {theirs.dtype} in the base and {info.dtype} here",
            where=str(other.path),
        )
    if info.shape != theirs.shape and not _may_grow(name, theirs.shape, info.shape):
        raise WeightsError(
            f"tensor {name} has shape {list(info.shape)}, and {list(theirs.shape)} in the base",
            where=str(other.path),
            hint=f"is {base.path} the right base?",
        )
    return Step(name, info, base=partner, overlap=theirs.numel)


def _counterpart(name: str, base: Checkpoint) -> str | None:
    """The base's tensor that `name` belongs to."""
    bare = name.removeprefix(OWN_PREFIX)
    for candidate in (name, bare):
        if candidate in base.tensors:
            return candidate
    # A base that ties its output matrix to its input matrix stores only the latter.
    if bare.endswith("lm_head.weight") and base.config.get("tie_word_embeddings"):
        for candidate in base.tensors:
            if candidate.endswith("embed_tokens.weight"):
                return candidate
    return None


def _may_grow(name: str, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Whether `new` is `old` with rows added, in a table that has a row for each token."""
    return (
        name.endswith(_GROWING) and len(old) == len(new) and old[1:] == new[1:] and new[0] > old[0]
    )


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
    kind = str(checkpoint.text_config.get("model_type", ""))
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

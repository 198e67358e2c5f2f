"""Activations computed twice to save memory (gradient checkpointing)."""

from __future__ import annotations

from torch import nn


def recomputes(model: nn.Module) -> bool:
    """Whether any layer computes its activations twice."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

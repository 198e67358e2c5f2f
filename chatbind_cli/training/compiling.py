"""The language model's layers compiled (`--compile`)."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from chatbind_cli.console import note
from chatbind_cli.errors import reason


def compile_layers(model: PreTrainedModel, *, backend: str = "inductor") -> None:
    """Has a model's repeated layers compiled when they are first used, for any batch and length.

    What is around the layers (soft tokens, caches, the loss) stays as it is. They share what one
    costs to compile, except behind a shared prefix. Where no compiler works a note says so.

    Args:
        model: a language model.
        backend: of `torch.compile`.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    device = next(model.parameters()).device
    try:
        torch.compile(torch.sin, backend=backend)(torch.zeros(2, device=device))
    except Exception as error:  # whatever a compiler's absence looks like
        note(f"--compile has no effect: nothing compiles here ({reason(error)})")
        return
    # behind a shared prefix each layer's code knows its place in the cache, and all count as one
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, limit * len(layers))
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
    if not layers:
        note(f"--compile has no effect: {type(model).__name__} names no layers")

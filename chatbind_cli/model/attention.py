"""Which attention kernels a model runs with: the words of `--attn-implementation` made definite.

flash-attn needs CUDA to build and is installed by hand; PyTorch's own kernels are always there.
"""

from __future__ import annotations

import torch
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from chatbind_cli.errors import UsageError

_AMPERE, _HOPPER = 8, 9  # major compute capabilities


def resolve_attention(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that a word means, by transformers' name.

    Args:
        name: `auto` (the fastest that is installed and fits), `sdpa`, `flash_attention_2`,
            `flash_attention_3` or `eager`.
        device: where the model runs.
        dtype: the numbers that it computes in; under mixed precision the smaller ones.

    Raises:
        UsageError: a named one cannot work here.
    """
    flash = ("flash_attention_3", "flash_attention_2")
    if name == "auto":
        return next((kind for kind in flash if _obstacle(kind, device, dtype) is None), "sdpa")
    if name in (*flash, "sdpa", "eager"):
        obstacle = _obstacle(name, device, dtype) if name in flash else None
        if obstacle is None:
            return name
        raise UsageError(
            f"--attn-implementation {name}: {obstacle}", hint="auto takes what works here"
        )
    raise UsageError(
        f"--attn-implementation {name} is not known",
        hint=f"choose one of auto, sdpa, {', '.join(reversed(flash))}, eager",
    )


def _obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a flash attention cannot work; None where it can."""
    third = name == "flash_attention_3"
    if device.type != "cuda" or not torch.cuda.is_available():
        return "it needs an NVIDIA GPU"
    if not (is_flash_attn_3_available() if third else is_flash_attn_2_available()):
        return "flash-attn-3 is not installed" if third else "flash-attn is not installed"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 or bfloat16, and this model in {dtype}".replace(
            "torch.", ""
        )
    generation = torch.cuda.get_device_capability(device)[0]
    if third and generation != _HOPPER:
        return "it needs a GPU of the Hopper generation (H100, H200)"
    if generation < _AMPERE:
        return "it needs a GPU of the Ampere generation (A100, RTX 30) or newer"
    return None

"""What `--attn-implementation` means on machines of several kinds."""

from __future__ import annotations

import pytest
import torch

from chatbind_cli.errors import UsageError
from chatbind_cli.model import attention
from chatbind_cli.model.attention import resolve_attention

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def machine(monkeypatch, *installed: int, generation: int | None = 8) -> None:
    """One with a GPU (or none) of a generation, and these versions of flash attention."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: generation is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    for version in (2, 3):
        name = f"is_flash_attn_{version}_available"
        monkeypatch.setattr(attention, name, lambda version=version: version in installed)


@pytest.mark.parametrize(
    ("installed", "generation", "dtype", "chosen"),
    [
        ((), 9, torch.bfloat16, "sdpa"),
        ((2,), 8, torch.bfloat16, "flash_attention_2"),
        ((2,), 9, torch.float16, "flash_attention_2"),
        ((2, 3), 9, torch.bfloat16, "flash_attention_3"),
        ((2, 3), 8, torch.bfloat16, "flash_attention_2"),
        ((2, 3), 7, torch.float16, "sdpa"),
        ((2, 3), 9, torch.float32, "sdpa"),
    ],
)
def test_auto_takes_the_fastest_that_fits(
    monkeypatch, installed, generation, dtype, chosen
) -> None:
    machine(monkeypatch, *installed, generation=generation)
    assert resolve_attention("auto", GPU, dtype) == chosen


def test_on_a_cpu_it_is_always_pytorch(monkeypatch) -> None:
    machine(monkeypatch, 2, 3)
    assert resolve_attention("auto", CPU, torch.bfloat16) == "sdpa"
    for name in ("sdpa", "eager"):
        assert resolve_attention(name, CPU, torch.float32) == name


@pytest.mark.parametrize(
    ("name", "installed", "generation", "dtype", "told"),
    [
        ("flash_attention_2", (2,), None, torch.float16, "needs an NVIDIA GPU"),
        ("flash_attention_2", (3,), 9, torch.float16, "flash-attn is not installed"),
        ("flash_attention_3", (2,), 9, torch.float16, "flash-attn-3 is not installed"),
        ("flash_attention_2", (2,), 9, torch.float32, "and this model in float32"),
        ("flash_attention_2", (2,), 7, torch.float16, "Ampere"),
        ("flash_attention_3", (3,), 10, torch.float16, "Hopper"),
        ("flash", (2,), 9, torch.float16, "is not known; choose one of auto, sdpa"),
    ],
)
def test_a_named_one_that_cannot_work_says_why(
    monkeypatch, name, installed, generation, dtype, told
) -> None:
    machine(monkeypatch, *installed, generation=generation)
    with pytest.raises(UsageError, match=f"--attn-implementation {name}.*{told}"):
        resolve_attention(name, GPU, dtype)

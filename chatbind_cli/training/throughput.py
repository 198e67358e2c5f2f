"""How fast a run trains, and how much of the hardware's arithmetic that is.

Work is what the data ask for: no padding, and not the prefix that every sample of a frozen language
model shares. So the figures of a run can be compared whatever tricks it plays.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

import torch
from transformers import PreTrainedModel

from chatbind_cli.model.chatbind import word_embeddings

# dense bfloat16 (float16 where there is none) in TFLOP/s, from the makers' data sheets; the first
# name that is found in the device's counts
_PEAK_TFLOPS: Final = (
    ("B200", 2250.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("A40", 150.0),
    ("A10", 125.0),
    ("RTX 4090", 165.0),
    ("RTX 3090", 71.0),
    ("V100", 125.0),
    ("T4", 65.0),
)

T = TypeVar("T")


class Work(NamedTuple):
    """What a batch asks of the language model.

    Attributes:
        samples: conversations.
        tokens: positions that are neither padding nor constant prefix.
        labelled: those that need logits.
        context: pairs of such a position and one that it may look at, itself included.
    """

    samples: int
    tokens: int
    labelled: int
    context: int

    @classmethod
    def of(cls, lengths: Iterable[int], labelled: int) -> Work:
        """The work of samples of these lengths in tokens, with so many labelled positions."""
        own = list(lengths)
        return cls(len(own), sum(own), labelled, sum(n * (n + 1) // 2 for n in own))

    def without_prefix(self, prefix: int) -> Work:
        """The same work, where the first tokens of every sample are the same and need none."""
        tokens, pairs = self.samples * prefix, self.samples * prefix * (prefix + 1) // 2
        return self._replace(tokens=self.tokens - tokens, context=self.context - pairs)


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations of training, counted as in PaLM (Chowdhery et al., 2022, app. B).

    A multiplication by a matrix costs 2 operations for each of its numbers and each token, forward;
    as much again for the gradient of its input, and again for that of its weights, if they train.
    Attention costs 4 operations for each number of the width and each pair of positions, forward,
    and twice that backward. Recomputed activations are not work.

    Attributes:
        body: numbers in the matrices that every token passes.
        head: numbers in the output layer, which only labelled positions need.
        attention: layers x heads x width of a head.
        passes: 3 where the language model trains, 2 where it is frozen.
    """

    body: int
    head: int
    attention: int
    passes: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelFlops:
        """Those of a ChatBind model, of which that is free which is to train."""
        head = model.get_output_embeddings()
        outside = {id(p) for m in (head, word_embeddings(model)) if m for p in m.parameters()}
        config = model.config.get_text_config()
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        active = (getattr(config, "num_experts_per_tok", None) or 1) / (experts or 1)
        body, trained = 0.0, False
        for name, parameter in model.named_parameters():
            if id(parameter) in outside or parameter.dim() < 2:
                continue
            body += parameter.numel() * (active if experts and ".experts." in name else 1)
            inside = name.startswith("language_model.") and "lora_" not in name
            trained |= inside and parameter.requires_grad
        heads = getattr(config, "num_attention_heads", 0) or 0
        width = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
        return cls(
            body=round(body),
            head=sum(p.numel() for p in head.parameters()) if head is not None else 0,
            attention=(getattr(config, "num_hidden_layers", 0) or 0) * heads * width,
            passes=3 if trained else 2,
        )

    def __call__(self, work: Work) -> float:
        """The operations of that work."""
        matrices = self.body * work.tokens + self.head * work.labelled
        return 2.0 * self.passes * matrices + 12.0 * self.attention * work.context


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """What a device could do at most, in operations a second; None where that is not known.

    Args:
        device: that trains.
        dtype: of the matrix products; only bfloat16 and float16 have a known figure.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for known, peak in _PEAK_TFLOPS if known in name), None)


class Meter:
    """Counts one process's work, and the time that passes over it, between two log records.

    Args:
        flops: of the model.
        peak: of this process's device, see `peak_flops`.
    """

    def __init__(self, flops: ModelFlops, peak: float | None) -> None:
        self._flops, self._peak = flops, peak
        self.restart()

    def restart(self) -> None:
        """Begins to count anew, from now on."""
        self._since = time.monotonic()
        self._work, self._waited_s = [0, 0, 0, 0], 0.0

    def add(self, work: Work) -> None:
        """Counts work."""
        self._work = [a + b for a, b in zip(self._work, work, strict=True)]

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches, with a count of the time in which the next was not there yet."""
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self._waited_s += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def counts(self) -> list[float]:
        """What this process counted, for a sum over all of them."""
        return [*map(float, self._work), self._waited_s]

    def rates(self, counts: list[float], processes: int) -> dict[str, float]:
        """The rates since the last call, and the start of the next count.

        Args:
            counts: `counts` summed over all processes.
            processes: how many there are.

        Returns:
            `samples_per_s`, `tokens_per_s`, `data_wait` (share of the time), and, where they can
            be told, `mfu` (share of the devices' peak) and `gpu_memory_gib` (highest so far).
        """
        seconds = max(time.monotonic() - self._since, 1e-9)
        *work, waited_s = counts
        work_done = Work(*map(int, work))
        rates = {
            "samples_per_s": work_done.samples / seconds,
            "tokens_per_s": work_done.tokens / seconds,
            "data_wait": waited_s / processes / seconds,
        }
        if self._peak is not None:
            rates["mfu"] = self._flops(work_done) / (seconds * processes * self._peak)
        if torch.cuda.is_available():
            rates["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.restart()
        return {name: float(f"{value:.4g}") for name, value in rates.items()}

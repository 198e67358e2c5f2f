"""How an answer is generated: the few numbers that a user may choose.

Apart from `generation`, which brings torch: a command checks them before it loads anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chatbind_cli.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """What decides an answer beside the model and the prompt.

    Raises:
        UsageError: a value is outside its range.
    """

    max_new_tokens: int = 512
    """Tokens after which an answer is cut off."""
    temperature: float = 0.0
    """0: always the likeliest token (greedy); above: sampled from the distribution at that
    temperature."""
    top_p: float = 1.0
    """Sampling looks only at the likeliest tokens that hold this much of the probability."""
    num_beams: int = 1
    """Beams of beam search; 1 for none."""
    seed: int = 0
    """Seed of sampling; the answers of greedy decoding do not depend on it."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, beside the model's own end. They are not part of it."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_new_tokens", 1, 1 << 20),
            ("temperature", 0.0, 100.0),
            ("num_beams", 1, 64),
            ("seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(f"{name} is {value}", hint=f"it must lie between {low} and {high}")
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"top_p is {self.top_p}", hint="it must lie above 0, and be at most 1")
        if not all(self.stop):
            raise UsageError("a stop text is empty", hint="leave it out")

    @property
    def sampled(self) -> bool:
        """Whether answers are drawn at random."""
        return self.temperature > 0.0

    def as_record(self) -> dict[str, Any]:
        """What an answer record says of it; without what had no influence."""
        record: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
        }
        if self.sampled:
            record |= {"top_p": self.top_p, "seed": self.seed}
        if self.num_beams > 1:
            record["num_beams"] = self.num_beams
        if self.stop:
            record["stop"] = list(self.stop)
        return record

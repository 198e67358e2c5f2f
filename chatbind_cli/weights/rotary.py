"""The rotary frequencies that old LLaMA checkpoints carry as buffers, computed from the config.

The reference pushes them through float16 on the way (0.09997... in place of 0.1); a buffer that
follows from three numbers of the config is better computed than carried.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def inverse_frequencies(config: Mapping[str, Any], pairs: int) -> torch.Tensor | None:
    """Frequencies of a LLaMA-style rotary embedding, float32 [pairs], in radians per position.

    Args:
        config: a model's `config.json`.
        pairs: half the width of an attention head.

    Returns:
        None where the config stretches the positions in a way that is not plain or linear, so
        that the frequencies cannot be told from base and width alone.

    Source: RoFormer (Su et al., 2021), section 3.2.2.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        return None
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    if kind not in ("default", "linear") or not isinstance(theta, (int, float)):
        return None
    exponents = torch.arange(0, 2 * pairs, 2, dtype=torch.float32) / (2 * pairs)
    return 1.0 / (float(theta) ** exponents)

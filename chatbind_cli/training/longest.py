"""How long a sample may be: what is asked for, as far as the language model can read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.console import note
from chatbind_cli.errors import UsageError
from chatbind_cli.worker import is_worker

PUBLISHED: Final = 2048
# a tokenizer that was told no length says a number like 10^30
_SANE: Final = 1 << 24


def longest_sample(model: Path, wanted: int | None) -> int:
    """The number of tokens at which samples are cut.

    Args:
        model: the language model's folder, which need not be there yet.
        wanted: by the user; None: the published length, if the model and its tokenizer go so far.

    Raises:
        UsageError: it is more than the model has positions.
    """
    config = read_json(model / "config.json", missing_ok=True)
    inner = config.get("text_config")
    positions = _positions(inner if isinstance(inner, dict) else config)
    if wanted is not None:
        if positions is not None and wanted > positions:
            raise UsageError(
                f"--model-max-length {wanted} is more than the {positions} tokens that {model} "
                "was made to read",
                hint=f"leave it out, or say at most {positions}",
            )
        return wanted
    tokenizer = read_json(model / "tokenizer_config.json", missing_ok=True)
    limits = [positions, _count(tokenizer.get("model_max_length"))]
    longest = min([PUBLISHED, *(limit for limit in limits if limit is not None)])
    if longest < PUBLISHED and not is_worker():
        note(f"samples are cut at {longest} tokens, which is what the language model goes by")
    return longest


def _positions(config: Mapping[str, Any]) -> int | None:
    """How many positions a model can tell apart; None where its configuration does not say."""
    known = _count(config.get("max_position_embeddings")) or _count(config.get("max_seq_len"))
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if known is None or not isinstance(scaling, dict):
        return known
    factor = scaling.get("factor")
    first = _count(scaling.get("original_max_position_embeddings")) or known
    # some configurations give the length before scaling, others the one after
    scaled = int(first * factor) if isinstance(factor, int | float) and factor > 1 else first
    return max(known, scaled)


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and 0 < value < _SANE else None

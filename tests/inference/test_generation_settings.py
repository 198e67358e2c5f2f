"""Generation settings: ranges, and what records say of them."""

from __future__ import annotations

import pytest

from chatbind_cli.errors import UsageError
from chatbind_cli.inference.generation_settings import GenerationSettings


@pytest.mark.parametrize(
    "values",
    [
        *({"max_new_tokens": 0}, {"max_new_tokens": float("nan")}, {"stop": ("",)}),
        *({"temperature": value} for value in (-0.1, 1e-300, float("nan"), float("inf"))),
        *({"top_p": value} for value in (0.0, 1.1, float("nan"))),
        *({"min_p": 1.1}, {"top_k": -1}, {"length_penalty": 1e9}, {"repetition_penalty": 0.0}),
    ],
)
def test_values_outside_their_range_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(values)).replace("stop", "a stop text")):
        GenerationSettings(**values)


def test_a_record_leaves_out_what_had_no_influence() -> None:
    assert GenerationSettings(max_new_tokens=4, seed=7, top_p=0.5).as_record() == {
        "max_new_tokens": 4,
        "temperature": 0.0,
    }
    assert GenerationSettings(temperature=0.5, seed=7).as_record()["seed"] == 7

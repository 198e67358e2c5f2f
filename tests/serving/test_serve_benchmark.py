"""`benchmarks/serve.py`: its crowd, small and for a moment."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.questions import Question
from chatbind_cli.media.medium import Medium
from tests.serving.conftest import SETTINGS, Running

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def crowd() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("serving.crowd")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_a_crowd_gets_its_answers_and_tells_of_wrong_ones(
    crowd: Any, running: Running, answerer: Answerer
) -> None:
    asked = [("What?", "image", "1.png"), ("And this?", "depth", "depth.png")]
    prepared = answerer.prepare(
        [Question(text, (Medium(kind, path),)) for text, kind, path in asked]
    )
    answers = answerer.generate(prepared, SETTINGS)
    questions = [
        crowd.Asked(*words, answer.text) for words, answer in zip(asked, answers, strict=True)
    ]
    first = asyncio.run(crowd.each_once(running.url, questions))
    assert (first.answers, first.wrong) == (2, [])
    tally = asyncio.run(crowd.crowd(running.url, questions, 20, 1.0))
    assert tally.wrong == []
    assert tally.answers
    assert tally.tokens >= tally.answers
    assert len(tally.first_s) < len(tally.whole_s) == tally.answers
    assert tally.troubles["vanished"]
    lied_to = [crowd.Asked("What?", "image", "1.png", "nothing that it would say")]
    assert asyncio.run(crowd.crowd(running.url, lied_to, 4, 0.5)).wrong

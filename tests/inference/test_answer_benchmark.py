"""`benchmarks/answer.py`, with a model so small that it takes a second: every way, one answer."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("answer")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_every_way_gives_the_same_answers(
    benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = benchmark.PRESETS["smoke"]
    benchmark.make_world(tmp_path, preset, 20)
    wanted = {r["id"]: r["tokens"] for r in json.loads((tmp_path / "questions.json").read_text())}
    assert len(wanted) == 20 and max(wanted.values()) > 3 * min(wanted.values())
    found, answers = {}, {}
    for way in preset["ways"]:
        capsys.readouterr()
        arguments = Namespace(folder=tmp_path, way=way, dtype="float32", url=None)
        benchmark.measure(arguments)
        found[way] = json.loads(capsys.readouterr().out.splitlines()[-1])
        answers[way] = json.loads((tmp_path / "answers.json").read_text())
    whole = answers[benchmark.BASE]
    assert set(whole) == {str(n) for n in wanted}
    assert len(set(whole.values())) > 10
    for way in set(answers) - {"chat"}:
        assert answers[way] and answers[way].items() <= whole.items(), way
    rates = found["rows 16"]
    assert rates["tokens_per_s"] == pytest.approx(
        rates["answers_per_s"] * sum(wanted.values()) / 20, rel=0.01
    )
    assert len(found["chat"]["first_token_s"]) == 9
    assert set(benchmark.ratios(found)) == {
        "rows_16_than_batches_of_16",
        "rows_16_than_one_by_one",
        "turn_9_than_turn_1",
    }

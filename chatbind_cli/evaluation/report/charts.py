"""Where the marks of the report's charts lie, in SVG units.

Numbers in, places and words out; how they look is the template's (`charts.j2`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from chatbind_cli.evaluation.figures import Row
from chatbind_cli.evaluation.scores import Item
from chatbind_cli.evaluation.statistics import Pair, mean_intervals, mean_pair

WIDTH = 380.0
SIDE = 240.0
_TOP_SCORE = 10.0
_MOST_TICKS = 6


class Mark(NamedTuple):
    """A mark of one side: a dot with its whisker, or a part of a bar; `text` says it in words."""

    side: str
    at: float
    start: float | None
    end: float | None
    text: str


class Chart(NamedTuple):
    """Lines of marks over an axis."""

    lines: list[tuple[str, list[Mark]]]
    """Of each category its name and its marks."""
    ticks: list[tuple[float, str]]
    even: float | None = None
    """Where both sides are alike, if the axis says it."""


def relative_chart(rows: Sequence[Row]) -> Chart | None:
    """The relative score of each category with its interval."""
    shown = [(row.category, row.relative, row.ci95) for row in rows if row.relative is not None]
    if not shown:
        return None
    ends = [100.0, *(end for _, value, ci95 in shown for end in (value, *(ci95 or ())))]
    step, start, stop = _axis(min(ends), max(ends))

    def place(percent: float) -> float:
        return round((percent - start) / (stop - start) * WIDTH, 1)

    lines = []
    for category, value, ci95 in shown:
        low, high = (None, None) if ci95 is None else map(place, ci95)
        text = f"{category}: {value:.1f} %" + _range(ci95, ".1f")
        lines.append((category, [Mark("second", place(value), low, high, text)]))
    ticks = [(place(mark), str(mark)) for mark in range(start, stop + 1, step)]
    return Chart(lines, ticks, even=place(100.0))


def _range(ends: Pair | None, form: str) -> str:
    return "" if ends is None else f" ({ends[0]:{form}} to {ends[1]:{form}})"


def _axis(low: float, high: float) -> tuple[int, int, int]:
    """Step, start and end of an axis in whole numbers that holds both, with a margin."""
    span = max(high - low, 4.0)
    low, high = max(0.0, low - span / 20), high + span / 20
    steps = (step * 10**power for power in range(12) for step in (1, 2, 5))
    step = next(step for step in steps if (high - low) / step <= _MOST_TICKS)
    return step, step * math.floor(low / step), step * math.ceil(high / step)


def score_chart(results: Mapping[str, Mapping[Item, Pair]]) -> Chart | None:
    """The mean scores of both sides in each category with their intervals."""
    top = max([_TOP_SCORE, *(max(pair) for found in results.values() for pair in found.values())])

    def place(score: float) -> float:
        return round(score / top * WIDTH, 1)

    lines = []
    for category, found in results.items():
        pairs = list(found.values())
        means, intervals = mean_pair(pairs), mean_intervals(pairs) or (None, None)
        marks = []
        for side, mean, ci95 in zip(("first", "second"), means or (), intervals, strict=False):
            low, high = (None, None) if ci95 is None else map(place, ci95)
            text = f"{category}, {side}: {mean:g}" + _range(ci95, ".2f")
            marks.append(Mark(side, place(mean), low, high, text))
        if marks:
            lines.append((category, marks))
    step = 2 if top <= _TOP_SCORE else max(1, int(top // 5))
    ticks = [(place(mark), str(mark)) for mark in range(0, int(top) + 1, step)]
    return Chart(lines, ticks) if lines else None


def outcome_bars(rows: Sequence[Row]) -> list[tuple[str, str, list[Mark]]]:
    """How often the second answer is better, as good, and worse.

    Returns:
        Of each category its name, all in words, and the parts of its bar; a part's text is its
        count if that has room.
    """
    bars = []
    for row in rows:
        parts, start = [], 0.0
        for side, count in {"second": row.win, "tie": row.tie, "first": row.lose}.items():
            end = start + (count / row.n * WIDTH if row.n else 0.0)
            label = str(count) if end - start > 9 * len(str(count)) else ""
            parts.append(Mark(side, (start + end) / 2, round(start, 1), round(end, 1), label))
            start = end
        text = f"{row.category}: second better {row.win}, tie {row.tie}, first better {row.lose}"
        if row.n:
            bars.append((row.category, text, parts))
    return bars


def scatter(means: Iterable[Pair]) -> list[tuple[float, float, float, str]]:
    """One dot for each pair of scores: its place, its radius by the number of questions, words."""
    dots = []
    for (first, second), count in Counter(means).most_common():
        top = max(_TOP_SCORE, first, second)
        noun = "question" if count == 1 else "questions"
        text = f"first {first:g}, second {second:g}: {count} {noun}"
        x, y = first / top * SIDE, (1 - second / top) * SIDE
        dots.append((round(x, 1), round(y, 1), round(min(3 + count**0.5, 14), 1), text))
    return dots


def order_table(outcomes: Iterable[tuple[int, int]]) -> list[list[int]]:
    """How many questions had an outcome with the answers as given (a row) and swapped (a column).

    Args:
        outcomes: of each question that was judged in both orders: -1 first, 0 tie, 1 second.

    Returns:
        Three rows of three counts; nothing where no question was judged in both.
    """
    counts = Counter(outcomes)
    sides = (-1, 0, 1)
    return [[counts[given, swapped] for swapped in sides] for given in sides] if counts else []

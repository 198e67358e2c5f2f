"""Where the marks of the report's charts lie, in SVG units.

Numbers in, places out; how they look is the template's. Knows nothing of reviews.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from chatbind_cli.review.groups import Row
from chatbind_cli.review.scores import Unit
from chatbind_cli.review.statistics import Pair, mean_intervals, mean_pair

WIDTH = 380.0
SIDE = 240.0
_TOP_SCORE = 10.0
_MOST_TICKS = 6
_OUTCOMES = ("first", "tie", "second")


@dataclass(frozen=True, slots=True)
class Mark:
    """A dot with its interval; `text` says it in words."""

    side: str
    value: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """A category's line of marks."""

    label: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines of marks over an axis; `even` is where both sides are alike, if the axis says it."""

    lines: tuple[Line, ...]
    ticks: tuple[tuple[float, str], ...]
    even: float | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a bar: where it starts, how long it is, and its count if that has room."""

    side: str
    start: float
    length: float
    label: str


@dataclass(frozen=True, slots=True)
class Bar:
    """How the questions of a category came out; `text` says it in words."""

    label: str
    parts: tuple[Part, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Dot:
    """Questions with the same pair of scores."""

    x: float
    y: float
    radius: float
    text: str


@dataclass(frozen=True, slots=True)
class Cell:
    """How many questions had one outcome as given and another one swapped."""

    given: str
    swapped: str
    count: int
    share: float


def relative_chart(rows: Sequence[Row]) -> Chart | None:
    """The relative score of each category with its interval."""
    shown = [row for row in rows if row.relative is not None]
    if not shown:
        return None
    ends = [100.0]
    for row in shown:
        ends += [row.relative or 0.0, *(row.ci95 or ())]
    step, start, stop = _axis(min(ends), max(ends))

    def place(percent: float) -> float:
        return round((percent - start) / (stop - start) * WIDTH, 1)

    lines = []
    for row in shown:
        value = row.relative or 0.0
        low, high = (None, None) if row.ci95 is None else map(place, row.ci95)
        text = f"{row.category}: {value:.1f} %"
        if row.ci95 is not None:
            text += f" ({row.ci95[0]:.1f} to {row.ci95[1]:.1f})"
        lines.append(Line(row.category, (Mark("second", place(value), low, high, text),)))
    ticks = tuple((place(mark), str(mark)) for mark in range(start, stop + 1, step))
    return Chart(tuple(lines), ticks, even=place(100.0))


def _axis(low: float, high: float) -> tuple[int, int, int]:
    """Step, start and end of an axis in whole numbers that holds both, with a margin."""
    span = max(high - low, 4.0)
    low, high = max(0.0, low - span / 20), high + span / 20
    steps = (step * 10**power for power in range(12) for step in (1, 2, 5))
    step = next(step for step in steps if (high - low) / step <= _MOST_TICKS)
    return step, step * math.floor(low / step), step * math.ceil(high / step)


def outcome_chart(rows: Sequence[Row]) -> list[Bar]:
    """How often the second answer is better, as good, and worse in each category."""
    bars = []
    for row in rows:
        counts = {"second": row.win, "tie": row.tie, "first": row.lose}
        parts, start = [], 0.0
        for side, count in counts.items():
            length = count / row.n * WIDTH if row.n else 0.0
            label = str(count) if length > 9 * len(str(count)) else ""
            parts.append(Part(side, round(start, 1), round(length, 1), label))
            start += length
        if row.n:
            text = (
                f"{row.category}: second better {row.win}, tie {row.tie}, first better {row.lose}"
            )
            bars.append(Bar(row.category, tuple(parts), text))
    return bars


def score_chart(results: Mapping[str, Mapping[Unit, Pair]]) -> Chart | None:
    """The mean scores of both sides in each category with their intervals."""
    top = max([_TOP_SCORE, *(max(pair) for found in results.values() for pair in found.values())])
    lines = []
    for category, found in results.items():
        pairs = list(found.values())
        means = mean_pair(pairs)
        if means is None:
            continue
        intervals = mean_intervals(pairs)
        marks = []
        for number, side in enumerate(("first", "second")):
            text = f"{category}, {side}: {means[number]:g}"
            low = high = None
            if intervals is not None:
                ends = intervals[number]
                text += f" ({ends[0]:.2f} to {ends[1]:.2f})"
                low, high = (round(end / top * WIDTH, 1) for end in ends)
            marks.append(Mark(side, round(means[number] / top * WIDTH, 1), low, high, text))
        lines.append(Line(category, tuple(marks)))
    step = 2 if top <= _TOP_SCORE else max(1, int(top // 5))
    ticks = [(round(mark / top * WIDTH, 1), str(mark)) for mark in range(0, int(top) + 1, step)]
    return Chart(tuple(lines), tuple(ticks)) if lines else None


def scatter(means: Iterable[Pair]) -> list[Dot]:
    """One dot for each pair of scores, its area the number of questions."""
    counts = Counter(means)
    dots = []
    for (first, second), count in sorted(counts.items(), key=lambda item: -item[1]):
        top = max(_TOP_SCORE, first, second)
        noun = "question" if count == 1 else "questions"
        text = f"first {first:g}, second {second:g}: {count} {noun}"
        x, y = first / top * SIDE, (1 - second / top) * SIDE
        dots.append(Dot(round(x, 1), round(y, 1), round(min(3 + count**0.5, 14), 1), text))
    return dots


def order_table(outcomes: Iterable[tuple[int, int]]) -> list[list[Cell]]:
    """Who was better with the answers as given (a row) and swapped (a column).

    Args:
        outcomes: of each question that was judged in both orders: -1 first, 0 tie, 1 second.

    Returns:
        Three rows of three cells; nothing where no question was judged in both.
    """
    counts = Counter(outcomes)
    if not counts:
        return []
    most = max(counts.values())
    return [
        [
            Cell(
                _OUTCOMES[given + 1],
                _OUTCOMES[swapped + 1],
                counts[given, swapped],
                round(counts[given, swapped] / most, 3),
            )
            for swapped in (-1, 0, 1)
        ]
        for given in (-1, 0, 1)
    ]

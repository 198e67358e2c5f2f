"""Where the marks of the report's charts lie, in SVG units.

Numbers in, places out; how they look is the template's. Knows nothing of reviews.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from chatbind_cli.review.reading import Unit
from chatbind_cli.review.statistics import Pair, mean_intervals, mean_pair
from chatbind_cli.review.summary import Row

WIDTH = 380.0
SIDE = 240.0
_TOP_SCORE = 10.0
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
    """Lines of marks over an axis that starts at the left."""

    lines: tuple[Line, ...]
    ticks: tuple[tuple[float, str], ...]


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
    highest = max([100.0, *(row.ci95[1] if row.ci95 else row.relative or 0.0 for row in shown)])
    step = 25 if highest <= 150 else 50 * (1 + int(highest // 400))
    end = step * -(-int(highest + 0.999) // step)

    def place(percent: float) -> float:
        return round(percent / end * WIDTH, 1)

    lines = []
    for row in shown:
        value = row.relative or 0.0
        low, high = (None, None) if row.ci95 is None else map(place, row.ci95)
        text = f"{row.category}: {value:.1f} %"
        if row.ci95 is not None:
            text += f" ({row.ci95[0]:.1f} to {row.ci95[1]:.1f})"
        lines.append(Line(row.category, (Mark("second", place(value), low, high, text),)))
    return Chart(tuple(lines), tuple((place(mark), str(mark)) for mark in range(0, end + 1, step)))


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


def position_bias(outcomes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """How often the answer shown first won in both orders, and the answer shown last."""
    counts = Counter(outcomes)
    return counts[-1, 1], counts[1, -1]

"""Do the intervals of `summarize` hold the truth, where a judge likes length and the first place?

    python benchmarks/judging.py             # a hundred runs: three minutes of one core
    python benchmarks/judging.py --runs 3    # does it run?

Answers have a quality that people and a judge see alike; people go by it alone, the judge also by
how much longer an answer is, and by which one it saw first. It scores both orders of every
question. A line a figure: in how many runs its 95 % interval held the truth, known from the plan.
The lines with `naive` are what one would read without the method: the judge's win rate in place of
people's or of that at equal length, and one order in place of both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize
from scipy.special import expit

from chatbind_cli.evaluation.files import Mismatches
from chatbind_cli.evaluation.labels import with_people
from chatbind_cli.evaluation.length_control import length_controlled
from chatbind_cli.evaluation.ranking import ranking_of
from chatbind_cli.evaluation.summary import summarize

Record = dict[str, Any]

STRENGTHS = {"a": 0.0, "b": 0.3, "c": -0.4, "d": 0.8}
LENGTHS = {"a": 500, "b": 800, "c": 650, "d": 450}
"""Mean characters: b is not much better than a, but much longer."""
_SPREAD = 200.0
_SCALE = 250.0
_QUALITY = 0.6
"""How much the quality of a model's answers differs from question to question."""


@dataclass(frozen=True)
class Judge:
    """How much a judge goes by length and by place, in the logit of its choice."""

    length: float = 1.2
    first: float = 0.8


@dataclass(frozen=True)
class World:
    """Answers to some questions: of each model their quality and length, [q]."""

    quality: dict[str, np.ndarray]
    length: dict[str, np.ndarray]


def drawn(n: int, rng: np.random.Generator) -> World:
    """Answers of all models to n questions."""
    return World(
        {m: theta + _QUALITY * rng.standard_normal(n) for m, theta in STRENGTHS.items()},
        {
            m: np.maximum(1, mean + _SPREAD * rng.standard_normal(n)).round()
            for m, mean in LENGTHS.items()
        },
    )


def by_judge(world: World, a: str, b: str, judge: Judge) -> tuple[np.ndarray, np.ndarray]:
    """How likely the judge prefers b, as given and swapped, [q] each."""
    longer = np.tanh((world.length[b] - world.length[a]) / _SCALE)
    logit = 2 * (world.quality[b] - world.quality[a]) + judge.length * longer
    return expit(logit - judge.first), expit(logit + judge.first)


def by_people(world: World, a: str, b: str) -> np.ndarray:
    """How likely people prefer b, [q]."""
    return expit(2 * (world.quality[b] - world.quality[a]))


def reviews(
    world: World, pairs: Iterable[tuple[str, str]], judge: Judge, rng: np.random.Generator
) -> list[Record]:
    """What the judge writes of both orders of every question and pair."""
    found = []
    for number, (a, b) in enumerate(pairs, start=1):
        for order, likely in zip(([1, 2], [2, 1]), by_judge(world, a, b, judge), strict=True):
            for question, wins in enumerate(rng.random(len(likely)) < likely):
                lengths = [int(world.length[model][question]) for model in (a, b)]
                metadata = {"models": [a, b], "pair": [number], "order": order, "lengths": lengths}
                review = {"question_id": question, "tuple": [6, 8] if wins else [8, 6]}
                found.append(review | {"reviewer_id": "judge", "metadata": metadata})
    return found


def true_points(judge: Judge) -> dict[str, float]:
    """The points that all the questions there are would give: those of the expected win rates."""
    world, models = drawn(400_000, np.random.default_rng(99)), list(STRENGTHS)
    shares = {
        pair: float(np.mean(by_judge(world, *pair, judge))) for pair in combinations(models, 2)
    }

    def loss(theta: np.ndarray) -> float:
        total = theta.sum() ** 2
        for (a, b), share in shares.items():
            gap = theta[models.index(b)] - theta[models.index(a)]
            total += share * np.logaddexp(0, -gap) + (1 - share) * np.logaddexp(0, gap)
        return float(total)

    theta = optimize.minimize(loss, np.zeros(len(models)), method="BFGS").x
    return dict(zip(models, 1000 + 400 / np.log(10) * (theta - theta.mean()), strict=True))


def true_rates(judge: Judge) -> dict[str, float]:
    """How often b wins over a of all the questions there are: by whom, and at equal length."""
    world = drawn(400_000, np.random.default_rng(98))
    alike = World(world.quality, dict.fromkeys(LENGTHS, np.zeros(1)))
    return {
        "judge": float(np.mean(by_judge(world, "a", "b", judge))),
        "equal length": float(np.mean(by_judge(alike, "a", "b", judge))),
        "people": float(np.mean(by_people(world, "a", "b"))),
    }


def points_in(rng: np.random.Generator, n: int, judge: Judge) -> Iterator[tuple[str, Any]]:
    """Each model's points and their interval, in one run."""
    records = reviews(drawn(n, rng), combinations(STRENGTHS, 2), judge, rng)
    for rank in ranking_of(summarize(records)).ranks:
        yield f"points of {rank.model}", (rank.points, rank.ci95)


def rates_in(
    rng: np.random.Generator, n: int, labels: int, judge: Judge
) -> Iterator[tuple[str, Any]]:
    """The win rates of b over a and their intervals, in one run."""
    world = drawn(n, rng)
    records = reviews(world, [("a", "b")], judge, rng)
    prefer = rng.random(n) < by_people(world, "a", "b")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "human.jsonl"
        chosen = rng.permutation(n)[:labels].tolist()
        said = [{"question_id": q, "winner": "b" if prefer[q] else "a"} for q in chosen]
        path.write_text("".join(json.dumps(label) + "\n" for label in said))
        (summary,) = length_controlled(with_people(summarize(records), path, Mismatches()))
    total = summary.total
    rate = total["win_rate"], total["win_rate_ci95"]
    yield "win rate by the judge", rate
    yield "win rate at equal length", (total["lc_win_rate"], total["lc_win_rate_ci95"])
    yield "win rate by people", (total["true_win_rate"], total["true_win_rate_ci95"])
    yield "naive win rate at equal length", rate
    yield "naive win rate by people", rate
    (one_order,) = summarize(record for record in records if record["metadata"]["order"] == [1, 2])
    yield (
        "naive win rate by the judge",
        (one_order.total["win_rate"], one_order.total["win_rate_ci95"]),
    )


def covered(
    runs: int, *, questions: int, labels: int, judge: Judge = Judge(), points: bool = True
) -> Iterator[Record]:
    """A record a figure: the truth, and in how many runs its interval held it."""
    rates = true_rates(judge)
    truth = {f"points of {model}": value for model, value in true_points(judge).items()}
    for name in ("win rate", "naive win rate"):
        truth[f"{name} by the judge"] = rates["judge"]
        truth[f"{name} at equal length"] = rates["equal length"]
        truth[f"{name} by people"] = rates["people"]
    found: defaultdict[str, list[tuple[float, Sequence[float]]]] = defaultdict(list)
    for run in range(runs):
        rng = np.random.default_rng(run)
        for name, figure in rates_in(rng, questions, labels, judge):
            found[name].append(figure)
        for name, figure in points_in(rng, questions, judge) if points else ():
            found[name].append(figure)
    for name, figures in found.items():
        held = sum(bool(low <= truth[name] <= high) for _, (low, high) in figures)
        width = np.mean([high - low for _, (low, high) in figures])
        mean = np.mean([figure for figure, _ in figures])
        yield {
            **{"figure": name, "truth": round(truth[name], 4), "mean": round(float(mean), 4)},
            **{"mean_width": round(float(width), 4), "runs": runs, "held_the_truth": held},
        }


def main() -> None:
    """Prints a JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--labels", type=int, default=100, help="questions that people judge")
    args = parser.parse_args()
    for record in covered(args.runs, questions=args.questions, labels=args.labels):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()

"""How well the judge agrees with people, and the win rate that their labels correct."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from chatbind_cli.evaluation.figures import win_shares
from chatbind_cli.evaluation.files import DOUBLED, UNUSABLE, Mismatches
from chatbind_cli.evaluation.published import as_reviews
from chatbind_cli.evaluation.scores import item_of, judge_name, metadata_of, models_of, scores_of
from chatbind_cli.evaluation.statistics import cohens_kappa, outcome, prediction_powered
from chatbind_cli.evaluation.summary import ALL, Summary
from chatbind_cli.jsonl import Record, legible, read_lines


def with_people(summaries: Sequence[Summary], path: Path, mismatches: Mismatches) -> list[Summary]:
    """The figures, the last row of each with what people say of the same answers.

    Args:
        summaries: of reviews of pairs.
        path: labels: `{"question_id", "winner", "models"}`, or any form that reviews have. Those
            that do not say which models are meant are of the only pair that there is. Several
            people's labels of a question are averaged.
        mismatches: told what cannot be used, what comes twice, and what was not judged.
    """
    name, seen = legible(str(path)), set()
    sides = [list(of.names) for of in summaries]
    judged = [
        {} if of.single else {item[0]: share for item, share in of.shares[ALL].items()}
        for of in summaries
    ]
    votes: list[dict[str, list[float]]] = [{} for _ in summaries]
    for line in read_lines(path):
        if line.problem is not None:
            mismatches.add(name, UNUSABLE, f"{line.number}: {line.problem.what}")
            continue
        only = {"models": sides[0]} if len(sides) == 1 else {}
        for label in as_reviews(only | line.record):
            question, models = str(label.get("question_id")), models_of(label)
            key = str(metadata_of(label).get("slot") or [question, models, judge_name(label)])
            meant = [n for n, side in enumerate(sides) if sorted(side) == sorted(models)]
            meant = [n for n in meant if question in judged[n]]
            pair = scores_of(label)
            if pair is None:
                mismatches.add(name, "no winner, or not said of which models: question", question)
            elif not meant:
                mismatches.add(name, "labelled, but not judged: question", question)
            elif key in seen:
                mismatches.add(name, DOUBLED, question)
            else:
                seen.add(key)
                (share,) = win_shares([label], {item_of(label): pair}).values()
                for n in meant:
                    voted = share if sides[n] == models else 1 - share
                    votes[n].setdefault(question, []).append(voted)
    found = []
    for of, by_judge, by_people in zip(summaries, judged, votes, strict=True):
        said = _agreement(by_judge, by_people)
        rows = [row | dict.fromkeys(said) for row in of.rows[:-1]]
        found.append(replace(of, rows=[*rows, of.total | said]))
    return found


def _agreement(judged: Mapping[str, float], votes: Mapping[str, Sequence[float]]) -> Record:
    both = {of: (judged[of], sum(said) / len(said)) for of, said in votes.items()}
    outcomes = [(outcome((0.5, judge)), outcome((0.5, people))) for judge, people in both.values()]
    kappa = cohens_kappa(outcomes) if outcomes else None
    others = [share for question, share in judged.items() if question not in both]
    rate, ends = prediction_powered(list(both.values()), others) or (None, None)
    same = sum(judge == people for judge, people in outcomes)
    return {
        "labels": len(both),
        "agreement": round(same / len(both), 4) if both else None,
        "label_kappa": None if kappa is None else round(kappa, 4),
        "true_win_rate": rate,
        "true_win_rate_ci95": ends,
    }

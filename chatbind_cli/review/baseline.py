"""One run beside another on the same questions: can they be told apart?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from chatbind_cli.errors import RecordError
from chatbind_cli.review.groups import Row
from chatbind_cli.review.scores import Unit
from chatbind_cli.review.statistics import Pair, average, holm, paired_difference
from chatbind_cli.review.summary import ALL, Summary


def compare(summary: Summary, baseline: Summary) -> Summary:
    """The summary with each row compared with the baseline's, on the questions that both have.

    Raises:
        RecordError: they have no question in common.
    """
    rows = []
    for row in summary.rows:
        results = [of.results.get(row.category, {}) for of in (summary, baseline)]
        # Records of the reference do not say what a question is about.
        told = all(modality != "None" for found in results for _, modality, _ in found)
        ours, theirs = (_by_question(found, with_modality=told) for found in results)
        shared = [question for question in ours if question in theirs]
        if row.category == ALL and not shared:
            raise RecordError("shares no question with the baseline", where=summary.name)
        found = paired_difference([ours[q] for q in shared], [theirs[q] for q in shared])
        row = replace(row, baseline=baseline.name, n_both=len(shared))
        if found is not None:
            row = replace(
                row,
                difference=found.difference,
                difference_ci95=found.ci95,
                p_value=found.p_value,
            )
        rows.append(row)
    return replace(summary, rows=_corrected(rows))


def _corrected(rows: Sequence[Row]) -> list[Row]:
    """The rows with the p values of the categories corrected for their number.

    The test of `all` is the one that was wanted; looking at each category as well is several.
    """
    values = {
        row.category: row.p_value for row in rows if row.category != ALL and row.p_value is not None
    }
    values = dict(zip(values, holm(list(values.values())), strict=True))
    return [replace(row, p_value=values.get(row.category, row.p_value)) for row in rows]


def _by_question(results: dict[Unit, Pair], *, with_modality: bool) -> dict[tuple[str, str], Pair]:
    """Results without the answerers' names, which are what differs between two runs."""
    pairs: dict[tuple[str, str], list[Pair]] = {}
    for (question, modality, _), pair in results.items():
        pairs.setdefault((question, modality if with_modality else ""), []).append(pair)
    return {question: average(found) for question, found in pairs.items()}

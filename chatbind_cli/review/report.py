"""The report as one HTML file that needs nothing else: no network, no framework.

All text from models and files goes through the template's escaping. Beside it, a content policy
lets only the page's own script run, named by its hash, so that nothing in an answer could run
even if it got past the escaping. Knows nothing of how the figures came about (`summary`).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any
from urllib.parse import quote

from chatbind_cli.jsonl import Record
from chatbind_cli.review import charts
from chatbind_cli.review.entries import Entries, Entry
from chatbind_cli.review.exhibits import Cabinet
from chatbind_cli.review.groups import Row
from chatbind_cli.review.statistics import position_bias
from chatbind_cli.review.summary import ALL, Summary
from chatbind_cli.review.tables import (
    agreement_lines,
    cells,
    comparison_lines,
    description,
    headings,
    interval,
    order_lines,
    percents,
    titles,
)

_REASONS_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Glance:
    """A figure in large letters.

    Attributes:
        label: what it is.
        value: the figure.
        detail: how sure, of how many.
        bad: whether one should be warned.
    """

    label: str
    value: str
    detail: str = ""
    bad: bool = False


def render_report(
    summaries: Sequence[Summary],
    *,
    questions: Mapping[str, Record] | None = None,
    answers: Sequence[Mapping[str, Record]] = (),
    cabinet: Cabinet | None = None,
) -> Iterator[str]:
    """The whole page, in pieces.

    Args:
        summaries: the figures of each file of reviews, with the judges' words.
        questions: question records by id, to show what was asked.
        answers: answer records by id, one mapping an answer file, to show what was answered.
        cabinet: where the questions' media come from; None: they are named, not shown.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_part),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    script, style = _part("report_script.j2"), _part("report_style.j2")
    entries = Entries(questions or {}, answers, cabinet or Cabinet())
    several = len(summaries) > 1
    sections = [_section(summary, entries.of(summary), several=several) for summary in summaries]
    everything = [entry for section in sections for entry in section["entries"]]
    return environment.get_template("report.html").generate(
        title=_title(summaries),
        sections=sections,
        agreements=agreement_lines(summaries),
        runs=[summary.name for summary in summaries],
        categories=_sorted(entry.category for entry in everything),
        modalities=_sorted(entry.modality for entry in everything),
        n_entries=len(everything),
        blocks=entries.cabinet.blocks,
        policy="default-src 'none'; img-src data:; media-src data:; base-uri 'none'; "
        f"form-action 'none'; style-src {_hash(style)}; script-src {_hash(script)}",
        script=script,
        style=style,
        width=charts.WIDTH,
        side=charts.SIDE,
    )


def _part(name: str) -> str:
    return resources.files("chatbind_cli.review").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _sorted(values: Iterator[str]) -> list[str]:
    return sorted(set(values))


def _section(summary: Summary, entries: list[Entry], *, several: bool) -> dict[str, Any]:
    """What the template needs to know of one file of reviews; one of `several` filters by name."""
    columns = headings(summary.rows, several=False)
    reasons = list(summary.failures.items())
    bias = position_bias(summary.orders)
    total = next((row for row in summary.rows if row.category == ALL), None)
    return {
        "name": summary.name,
        "description": description(summary, named=False),
        "columns": titles(columns, summary.by),
        "rows": [(row.category == ALL, cells(row, columns)) for row in summary.rows],
        "notes": [*order_lines(summary), *comparison_lines(summary)],
        "checked": total is not None and total.accuracy_2 is not None,
        "relative": charts.relative_chart(summary.rows),
        "scores": charts.score_chart(summary.results),
        "dots": charts.scatter(summary.results.get(ALL, {}).values()),
        "orders": charts.order_table(summary.orders),
        "n_orders": len(summary.orders),
        "bias": bias,
        "by": summary.by,
        "within": f"run={quote(summary.name, safe='')}&" if several else "",
        "outcomes": charts.outcome_chart(summary.rows),
        "glances": [] if total is None else _glances(total, len(summary.reviews), bias),
        "failures": reasons[:_REASONS_SHOWN],
        "more_failures": sum(count for _, count in reasons[_REASONS_SHOWN:]),
        "entries": entries,
    }


def _title(summaries: Sequence[Summary]) -> str:
    """Who is compared with whom, as far as the reviews say."""
    firsts = dict.fromkeys(" + ".join(summary.models[0]) for summary in summaries)
    seconds = dict.fromkeys(" + ".join(summary.models[1]) for summary in summaries)
    if len(firsts) == 1 and all([*firsts, *seconds]):
        return f"{', '.join(seconds)} against {next(iter(firsts))}"
    return "Review"


def _glances(row: Row, n_reviews: int, bias: tuple[int, int]) -> list[Glance]:
    """What one wants to know first."""
    found = []
    if row.accuracy_2 is not None:
        accuracy = percents(row.accuracy_1, row.accuracy_2)
        found.append(Glance("accuracy", accuracy, "right answers, first / second"))
    if row.relative is not None:
        sure = f"95 % interval {interval(row.ci95)}" if row.ci95 else "of one question"
        found.append(Glance("relative score", f"{row.relative:.1f} %", sure))
    if row.n:
        counts = f"{row.win} : {row.tie} : {row.lose}"
        found.append(Glance("second better : tie : first better", counts, f"{row.n:,} questions"))
    if row.consistency is not None:
        detail = f"else the answer shown first won {bias[0]:,} x, the one shown last {bias[1]:,} x"
        value = f"{100 * row.consistency:.1f} %"
        found.append(Glance("same winner in both orders", value, detail))
    if row.kappa is not None:
        found.append(Glance("agreement of the judges", f"{row.kappa:.2f}", "Cohen's kappa"))
    of = f"of {n_reviews:,} reviews; in no mean" if row.failed else f"of {n_reviews:,} reviews"
    found.append(Glance("failed", f"{row.failed:,}", of, bad=row.failed > 0))
    if row.cost_usd:
        tokens = f"{row.prompt_tokens:,} tokens sent, {row.completion_tokens:,} received"
        found.append(Glance("paid at most", f"{row.cost_usd:.4f} USD", tokens))
    return found

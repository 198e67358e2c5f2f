"""From review records to summaries: which reviews hold, and their figures in rows, `all` last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from chatbind_cli.errors import RecordError, UsageError
from chatbind_cli.evaluation.figures import (
    answer_lengths,
    circumstances_of,
    figures_of,
    in_both_orders,
    mean_scores,
    scores_by_order,
    win_shares,
)
from chatbind_cli.evaluation.scores import (
    RULE_JUDGE,
    Item,
    is_single,
    item_of,
    judge_name,
    metadata_of,
    models_of,
    scores_of,
)
from chatbind_cli.evaluation.statistics import Pair, averages, holm, outcome, paired_difference
from chatbind_cli.jsonl import Record

ALL = "all"
_WORDS = ("content", "text")


@dataclass(slots=True)
class Summary:
    """The figures of one pair of answer files, and who judged whom.

    Attributes:
        name: the file's name, or `stdin`; of several pairs in it with the second answerer's.
        by: what makes a row: `category`, `modality` or `judge`.
        rows: the categories in order of first appearance, `all` last.
        models: the first and the second answerer, as far as the reviews say.
        single: whether the answers were graded alone.
        reviews: the records behind the figures: failed ones too, replaced ones not.
        results: the mean scores of each question, by category; of answers that were graded alone
            each score twice.
        shares: how much of a win each question gives to the second answer, by category.
        lengths: of the answers in characters, by question, as far as the reviews say.
        orders: of each question and judge with both orders, who won as given and who swapped:
            -1 first, 0 tie, 1 second.
        unbalanced: how often judges who never saw both orders of a question saw one as given, and
            swapped.
    """

    name: str
    by: str
    rows: list[Record]
    models: tuple[list[str], list[str]]
    single: bool
    reviews: list[Record]
    results: dict[str, dict[Item, Pair]]
    shares: dict[str, dict[Item, float]]
    lengths: dict[Item, Pair]
    orders: list[tuple[int, int]]
    unbalanced: tuple[int, int]

    @property
    def total(self) -> Record:
        """The row of all categories."""
        return self.rows[-1]

    @property
    def names(self) -> tuple[str, str]:
        """What to call the first and the second answerer; empty where nothing says."""
        first, second = map(" + ".join, self.models)
        return first, second

    def renamed(self, name: str) -> Summary:
        """The same figures under another name."""
        return replace(self, name=name, rows=[row | {"review": name} for row in self.rows])


def summarize(
    records: Iterable[Record],
    *,
    name: str = "",
    by: str = "category",
    ignore: Sequence[str] = (),
    with_words: bool = False,
) -> list[Summary]:
    """The figures of one file of reviews, apart for each pair of answer files in it.

    They are grouped `by` category, modality or judge, and leave out questions to `ignore`. For a
    report what the judges wrote is kept: `with_words`.
    """
    left_out = set(ignore)
    kept = (record for record in records if str(record.get("question_id")) not in left_out)
    pairs = _by_pair(latest(kept, with_words=with_words))
    summaries = [_summary(reviews, name, by) for reviews in pairs or [[]]]
    if len(summaries) == 1:
        return summaries
    firsts = {tuple(summary.models[0]) for summary in summaries if not summary.single}
    names = []
    for summary in summaries:
        first, second = (name or "unknown" for name in summary.names)
        called = first if summary.single else f"{first}, {second}" if len(firsts) > 1 else second
        names.append(f"{name}: {called}" if name else called)
    return [summary.renamed(of) for summary, of in zip(summaries, names, strict=True)]


def latest(records: Iterable[Record], *, with_words: bool) -> list[Record]:
    """The reviews that still hold: of several with one key the last one, and none of old words.

    Where an answer or its question changed, or a judge's rule, a later run may make fewer reviews
    than the one before it (one order instead of both). The old ones of the others are left out.

    Args:
        records: review records, in the order in which they were made.
        with_words: keep what the judges wrote; figures do without, in a fraction of the memory.
    """
    found: dict[str, Record] = {}
    newest: dict[tuple[str, ...], Any] = {}
    for number, record in enumerate(records):
        kept = record
        if not with_words:
            kept = {key: value for key, value in record.items() if key not in _WORDS}
        found[str(metadata_of(record).get("slot") or number)] = kept
        newest |= _made_from(record)
    return [record for record in found.values() if _made_from(record).items() <= newest.items()]


def _made_from(review: Record) -> dict[tuple[str, ...], Any]:
    """The hash of what was judged, by question and answerers, and that of the rule, by judge too.

    A question whose medium changed is the same one.
    """
    question, _, models = item_of(review)
    metadata = metadata_of(review)
    return {
        (question, models): metadata.get("subject"),
        (question, models, judge_name(review)): metadata.get("basis"),
    }


def _by_pair(reviews: Sequence[Record]) -> list[list[Record]]:
    """The reviews of each pair of answer files.

    A pair in which a question was answered by several models in turn is two runs in one file:
    their reviews are of different things, and no mean is of both.
    """
    first_models: dict[tuple[str, str], list[str]] = {}
    in_turn = set()
    for review in reviews:
        pair, models = _pair(review), models_of(review)
        if models and first_models.setdefault((pair, item_of(review)[0]), models) != models:
            in_turn.add(pair)
    found: dict[str, list[Record]] = {}
    strays = []
    for review in reviews:
        pair = _pair(review)
        if not models_of(review) and scores_of(review) is None:
            strays.append(review)  # it says nothing of who answered, and has no scores to mix
        else:
            key = f"{pair} {models_of(review)}" if pair in in_turn else pair
            found.setdefault(key, []).append(review)
    if strays:
        found.setdefault(next(iter(found), ""), []).extend(strays)
    return list(found.values())


def _pair(review: Record) -> str:
    return f"{is_single(review)} {metadata_of(review).get('pair') or [1, 2]}"


def _summary(reviews: list[Record], name: str, by: str) -> Summary:
    groups: dict[str, list[Record]] = {}
    for review in reviews:
        groups.setdefault(_category(review, by), []).append(review)
    groups.pop(ALL, None)
    groups[ALL] = reviews
    seen = {category: scores_by_order(group) for category, group in groups.items()}
    both = in_both_orders(seen[ALL])
    balanced = {judge for _, judge in both}
    single = any(map(is_single, reviews))
    alone = Counter(
        swapped
        for _, judge, swapped in seen[ALL]
        if not single and judge not in (*balanced, RULE_JUDGE)
    )
    results = {category: mean_scores(found, balanced) for category, found in seen.items()}
    shares = {key: win_shares(group, results[key]) for key, group in groups.items()}
    lengths = answer_lengths(reviews)
    rows = [
        {"category": key}
        | figures_of(group, seen[key], results[key], shares[key], lengths)
        | {"review": name}
        | circumstances_of(group)
        for key, group in groups.items()
    ]
    models: tuple[list[str], list[str]] = ([], [])
    for review in reviews:
        for side, model in zip(models, models_of(review), strict=False):
            if model and model not in side:
                side.append(model)
    return Summary(
        name=name,
        by=by,
        rows=rows,
        models=models,
        single=single,
        reviews=reviews,
        results=results,
        shares=shares,
        lengths=lengths,
        orders=[(outcome(given), outcome(swapped)) for given, swapped in both.values()],
        unbalanced=(alone[False], alone[True]),
    )


def _category(review: Record, by: str) -> str:
    """What makes the review's line of the table; without a category it is in `all` alone."""
    values = {
        "category": review.get("category"),
        "modality": metadata_of(review).get("modality", "text"),
        "judge": review.get("reviewer_id"),
    }
    return ALL if values[by] in (None, "") else str(values[by])


def renamed(summaries: Sequence[Summary], names: Sequence[str]) -> list[Summary]:
    """The summaries with other names for the answerers.

    Args:
        summaries: the figures of one or more pairs of answerers, or of answers graded alone.
        names: of the first answerer, and of the second one of each pair, which then also names it.
    """
    firsts = {tuple(summary.models[0]) for summary in summaries if not summary.single}
    if len(firsts) > 1:
        raise UsageError("--names goes with pairs that have the same first answerer")
    n_first = len(firsts)
    if len(names) != n_first + len(summaries):
        raise UsageError(
            f"--names needs {n_first + len(summaries)} names here, not {len(names)}",
            hint="the first answerer's, and the second one's of each pair",
        )
    found = []
    for summary, name in zip(summaries, names[n_first:], strict=True):
        models = ([name], list[str]()) if summary.single else ([names[0]], [name])
        called = summary.renamed(name) if len(summaries) > 1 else summary
        found.append(replace(called, models=models))
    return found


def compared(summaries: Sequence[Summary], baselines: Sequence[Summary]) -> list[Summary]:
    """Each run beside its baseline: the only one, or the one at its place among as many.

    Rows are compared with the baseline's on the questions that both have. The test of `all` is
    the one that was wanted; looking at each category as well is several, so their p values are
    corrected for their number.

    Raises:
        RecordError: a run and its baseline have no question in common.
    """
    if len(baselines) == 1:
        baselines = [baselines[0]] * len(summaries)
    if len(baselines) != len(summaries):
        raise UsageError(
            f"the baseline has {len(baselines)} pairs of answer files, the reviews {len(summaries)}"
        )
    if any(summary.single for summary in (*summaries, *baselines)):
        raise UsageError("single scores have no baseline", hint="rank them beside the others'")
    found = []
    for summary, baseline in zip(summaries, baselines, strict=True):
        rows = [row | _comparison(row["category"], summary, baseline) for row in summary.rows]
        tested = [row for row in rows[:-1] if row["p_value"] is not None]
        for row, p_value in zip(tested, holm([row["p_value"] for row in tested]), strict=True):
            row["p_value"] = p_value
        found.append(replace(summary, rows=rows))
    return found


def _comparison(category: str, summary: Summary, baseline: Summary) -> Record:
    """What a row gains beside a baseline."""
    results = [of.results.get(category, {}) for of in (summary, baseline)]
    # Records of the reference do not say what a question is about.
    told = all(modality != "None" for found in results for _, modality, _ in found)
    # The answerers' names are what differs between two runs.
    ours, theirs = (
        averages(((item[0], item[1] if told else ""), pair) for item, pair in found.items())
        for found in results
    )
    shared = [question for question in ours if question in theirs]
    if category == ALL and not shared:
        raise RecordError("shares no question with the baseline", where=summary.name)
    difference, ci95, p_value = paired_difference(
        [ours[question] for question in shared], [theirs[question] for question in shared]
    ) or (None, None, None)
    return {
        "baseline": baseline.name,
        "n_both": len(shared),
        "difference": difference,
        "difference_ci95": ci95,
        "p_value": p_value,
    }

"""`chatbind summarize`: tabulate review records."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chatbind_cli.console import note
from chatbind_cli.errors import RecordError, SomeRecordsFailed
from chatbind_cli.evaluation import tables
from chatbind_cli.evaluation.contexts import Contexts
from chatbind_cli.evaluation.files import (
    UNREADABLE,
    Mismatches,
    find_reviews,
    read_reviews,
    records_by_id,
    run_names,
)
from chatbind_cli.evaluation.labels import with_people
from chatbind_cli.evaluation.length_control import length_controlled
from chatbind_cli.evaluation.ranking import has_several, ranking_of
from chatbind_cli.evaluation.summary import Summary, compared, renamed, summarize
from chatbind_cli.files import bears, refuse_foreign_file, refuse_overlap, replace_file

from . import _base
from ._base import ListOption, in_group
from ._options import FILE, FOLDER, NEW_FILE, STREAM, media_root_options

if TYPE_CHECKING:
    from chatbind_cli.evaluation.ranking import Ranking
    from chatbind_cli.media.root import MediaRoot

_input = in_group("Input")
_inputs = in_group("Input", ListOption)
_output = in_group("Output")

_MARK = b'name="generator" content="chatbind summarize"'


@_base.command(
    "summarize",
    examples=[
        "chatbind summarize eval/reviews-audio.jsonl",
        "chatbind summarize eval/reviews-audio.jsonl --format markdown > table.md",
        "chatbind summarize --dir eval --by modality --json",
        "chatbind summarize eval/reviews-audio.jsonl --baseline eval/reviews-audio.jsonl",
        "chatbind summarize eval/reviews-audio.jsonl --html report.html --questions "
        "eval/questions-audio.jsonl --answers eval/answers-reference-audio.jsonl "
        "eval/answers-model-audio.jsonl --media-root media",
    ],
)
@click.argument("reviews", nargs=-1, type=STREAM, metavar="[REVIEWS]...")
@_inputs("-f", "--files", type=STREAM, help="Review files, as the words without an option.")
@_input(
    "-d",
    "--dir",
    "folder",
    type=FOLDER,
    help="Folder with review files (gpt4_text*.jsonl, review*.jsonl).",
)
@_inputs(
    "-i",
    "--ignore",
    metavar="ID",
    help="Questions to leave out; after the first, a word that names a file is a file of reviews.",
)
@_input(
    "--baseline",
    type=FILE,
    help="Reviews of another run on the same questions: each line of the table is compared with "
    "that run's by a paired permutation test; p of several categories is corrected (Holm).",
)
@_input(
    "--labels",
    type=FILE,
    help="What people say of some of the questions (question_id, winner: a model, 1, 2 or tie; of "
    "several pairs also models): agreement with the judge, and the win rate that allows for its "
    "errors. FastChat's votes are read, too.",
)
@_output(
    "--by",
    type=click.Choice(["category", "modality", "judge"]),
    default="category",
    help="What makes a line of the table.",
)
@_output(
    "--ranking",
    is_flag=True,
    help="Rank all models of all files by who wins over whom (Bradley-Terry); answers that were "
    "graded alone by their mean score. With more than two models the tables do so anyway; with "
    "csv the ranking takes the place of the figures.",
)
@_output(
    "--length-controlled",
    "length_control",
    is_flag=True,
    help="Also the win rate that the second would have if both answers were equally long, as "
    "AlpacaEval 2 does: some judges like length.",
)
@in_group("Output", ListOption)(
    "--names",
    metavar="A B...",
    help="What to call who gave the answers: the first one, then the second one of each pair; "
    "default: as the reviews do.",
)
@_output(
    "--format",
    "form",
    type=click.Choice(["auto", "table", "markdown", "csv", "json"]),
    default="auto",
    help="auto: a table on a terminal, else json; json: all that is known, a record a line.",
)
@_output(
    "--html",
    "page",
    metavar="FILE",
    type=NEW_FILE,
    help="Also write a report that one can browse: figures, charts and every review in one file.",
)
@_input(
    "-q",
    "--questions",
    "--question",
    "questions",
    type=FILE,
    help="Question records, for the report.",
)
@_inputs(
    "--answers",
    "--answer-list",
    "answers",
    metavar="A B...",
    type=FILE,
    help="The answer files in the order of `review`, for the report.",
)
@_input(
    "--context",
    "--contexts",
    "contexts",
    type=FILE,
    help="The captions and boxes that `review` had, for the report.",
)
@_input(
    "--reference",
    "references",
    type=FILE,
    help="The answers that count as right, as for `review`, for the report; default: those that "
    "questions or answers carry.",
)
@media_root_options
@_output(
    "--media-limit",
    type=click.FloatRange(min=0),
    default=64.0,
    metavar="MB",
    help="Most megabytes of media in the report; what goes beyond is named, not shown.",
)
@_output(
    "--json",
    "as_json",
    is_flag=True,
    help="A record a line with the figures alone: category, n, mean_1, mean_2, relative, ci95, "
    "win, tie, lose, consistency, failed.",
)
def command(
    reviews: tuple[str, ...],
    files: tuple[str, ...],
    folder: Path | None,
    ignore: tuple[str, ...],
    by: str,
    names: tuple[str, ...],
    form: str,
    as_json: bool,
    page: Path | None,
    questions: Path | None,
    answers: tuple[Path, ...],
    baseline: Path | None,
    ranking: bool,
    length_control: bool,
    labels: Path | None,
    **shown: Any,
) -> None:
    """Tabulate review records: mean scores, and the second's as a percentage of the first's.

    Without files, reviews come from standard input, or on a terminal from the review files in
    this folder, `review` or `reviews`. Each file has figures of its own. Failed reviews are
    counted, and are in no mean; nor is a question that a judge of both orders saw in one only.
    Where the rule judge compared with right answers, the share of right ones (accuracy), of
    literal ones (exact) and the F1 of their words come first.
    """
    ids, after_ids = _apart(ignore)
    answerers, after_names = _apart(names)
    sources = find_reviews([*reviews, *files, *after_ids, *after_names], folder)
    if page is not None:
        others = [questions, baseline, labels, shown["contexts"], shown["references"]]
        refuse_overlap(page, [*sources, *answers, *others])
        refuse_foreign_file(page, lambda path: bears(path, _MARK), what="a report")
    called = run_names([*sources, *([str(baseline)] if baseline else [])])

    options: dict[str, Any] = {"by": by, "ignore": ids, "with_words": page is not None}
    summaries: list[Summary] = []
    for source in sources:
        summaries += summarize(read_reviews(source), name=called[source], **options)
        if not summaries[-1].reviews:
            where = "<stdin>" if source == "-" else source
            raise RecordError("holds no reviews", where=where, hint="see `chatbind review`")
    if answerers:
        summaries = renamed(summaries, answerers)
    if baseline is not None:
        name = str(baseline)
        others = summarize(read_reviews(name), name=called[name], **options)
        summaries = compared(summaries, others)
    mismatches = Mismatches()
    if labels is not None:
        summaries = with_people(summaries, labels, mismatches)
    if length_control:
        summaries = length_controlled(summaries)
    if as_json or form == "auto":
        form = "figures" if as_json else "table" if sys.stdout.isatty() else "json"
    for_programs = form in ("json", "figures", "csv")
    told = ranking or not for_programs
    asked = ranking or ((told or page is not None) and has_several(summaries))
    ranks = ranking_of(summaries) if asked else None
    tables.write(summaries, form, sys.stdout, ranks if told else None)
    if page is not None:
        _write_report(page, summaries, questions, answers, ranks, **shown)
    remarks = tables.remarks(summaries, ranks if told else None) if for_programs else []
    _say(summaries, [*remarks, *mismatches.lines()])
    if not any(summary.total["n"] for summary in summaries):
        raise RecordError("every review failed, so there is nothing to average")
    bad = sum(UNREADABLE in review for summary in summaries for review in summary.reviews)
    if bad:
        raise SomeRecordsFailed(f"{bad:,} reviews cannot be read, as said above")


def _apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """An option's words, one at least, and the files after them: `-i q1 reviews.jsonl`."""
    files = [word for word in words[1:] if word == "-" or _is_file(Path(word))]
    return [word for word in words if word not in files], files


def _is_file(path: Path) -> bool:
    return path.suffix in (".json", ".jsonl") or (path.exists() and not path.is_dir())


def _say(summaries: Sequence[Summary], remarks: Sequence[str]) -> None:
    """What the figures do not show, on stderr."""
    for line in remarks:
        note(line)
    for summary in summaries:
        for line in tables.failure_lines(summary):
            note(f"{summary.name}: {line}")


def _write_report(
    page: Path,
    summaries: Sequence[Summary],
    questions: Path | None,
    answers: Sequence[Path],
    ranking: Ranking | None,
    *,
    contexts: Path | None,
    references: Path | None,
    media_root: MediaRoot,
    media_limit: float,
) -> None:
    from chatbind_cli.evaluation.report.page import render_report  # noqa: PLC0415

    previews = None
    if media_root.folder is not None:
        from chatbind_cli.evaluation.report.previews import Previews  # noqa: PLC0415  brings torch

        previews = Previews(media_root, limit_bytes=int(media_limit * 1e6))
    mismatches = Mismatches()
    chunks = render_report(
        summaries,
        questions=None if questions is None else records_by_id(questions, mismatches),
        answers=[records_by_id(path, mismatches) for path in answers],
        contexts=None if contexts is None else Contexts(contexts, mismatches),
        references=None if references is None else records_by_id(references, mismatches),
        previews=previews,
        ranking=ranking,
    )
    with replace_file(page) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(chunks)
    if questions is None or not answers:
        note("report: --questions and --answers let it show what was asked and answered")
    for problem in [*mismatches.lines(), *(previews.problems if previews else [])]:
        note(f"report: {problem}")
    note(f"report: {page}")

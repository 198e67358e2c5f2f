"""`chatbind summarize`: tabulate review records."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from chatbind_cli.artifacts import emit_record
from chatbind_cli.console import note
from chatbind_cli.errors import RecordError, SomeRecordsFailed, UsageError
from chatbind_cli.files import bears, refuse_foreign_file, refuse_overlap, replace_file
from chatbind_cli.jsonl import Line, Record, legible, read_lines
from chatbind_cli.review import tables
from chatbind_cli.review.cases import distinct_names, records_by_id
from chatbind_cli.review.mismatches import Mismatches
from chatbind_cli.review.summary import Summary, compare, renamed, summarize

from . import _base
from ._base import GroupedOption, ListOption
from ._options import media_root_options

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_input = partial(click.option, cls=GroupedOption, group="Input")
_output = partial(click.option, cls=GroupedOption, group="Output")

# Names of review files in a folder, as the seed's scripts write them and as Vicuna published them.
_PREFIXES = ("gpt4_text_", "reviews_", "review_")
_PATTERNS = ("gpt4_text*.jsonl", "review*.jsonl", "review*.json")
_FOLDERS = (".", "review", "reviews")
_REASONS_SHOWN = 8
_UNREADABLE = "unreadable"
_MARK = b'name="generator" content="chatbind summarize"'


@_base.command(
    "summarize",
    short_help="Tabulate review records.",
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
@click.argument(
    "reviews", nargs=-1, type=click.Path(dir_okay=False, allow_dash=True), metavar="[REVIEWS]..."
)
@click.option(
    "-f",
    "--files",
    cls=ListOption,
    group="Input",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="Review files, as the words without an option.",
)
@_input(
    "-d",
    "--dir",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with review files (gpt4_text*.jsonl, review*.jsonl).",
)
@click.option(
    "-i",
    "--ignore",
    cls=ListOption,
    group="Input",
    metavar="ID",
    help="Questions to leave out; after the first, a word that names a file is a file of reviews.",
)
@_input(
    "--baseline",
    type=_FILE,
    help="Reviews of another run on the same questions: each line of the table is compared with "
    "that run's by a paired permutation test; p of several categories is corrected (Holm).",
)
@_output(
    "--by",
    type=click.Choice(["category", "modality", "judge"]),
    default="category",
    help="What makes a line of the table.",
)
@click.option(
    "--names",
    cls=ListOption,
    group="Output",
    metavar="A B...",
    help="What to call who gave the answers: the first ones, then the second ones of each pair; "
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
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write a report that one can browse: figures, charts and every review in one file.",
)
@_input(
    "-q",
    "--questions",
    "--question",
    "questions",
    type=_FILE,
    help="Question records, for the report.",
)
@click.option(
    "--answers",
    "--answer-list",
    "answers",
    cls=ListOption,
    group="Input",
    metavar="A B...",
    type=_FILE,
    help="The answer files in the order of `review`, for the report.",
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
    **media: Any,
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
    sources = _sources([*reviews, *files, *after_ids, *after_names], folder)
    if page is not None:
        refuse_overlap(page, [*sources, *answers, questions, baseline])
        refuse_foreign_file(page, lambda path: bears(path, _MARK), what="a report")
    called = _names([*sources, *([str(baseline)] if baseline else [])])

    def read(source: str, *, with_words: bool) -> list[Summary]:
        records = map(_review, read_lines(source))
        return summarize(records, name=called[source], by=by, ignore=ids, with_words=with_words)

    summaries: list[Summary] = []
    for source in sources:
        found = read(source, with_words=page is not None)
        if not found[0].reviews:
            where = "<stdin>" if source == "-" else source
            raise RecordError("holds no reviews", where=where, hint="see `chatbind review`")
        summaries += found
    if answerers:
        summaries = _renamed(summaries, answerers)
    if baseline is not None:
        summaries = _compared(summaries, read(str(baseline), with_words=False))
    if form == "auto":
        form = "table" if sys.stdout.isatty() else "json"
    _print(summaries, "figures" if as_json else form)
    if page is not None:
        _write_report(page, summaries, questions, answers, media)
    _say(summaries, with_remarks=as_json or form in ("json", "csv"))
    if not any(row.n for summary in summaries for row in summary.rows):
        raise RecordError("every review failed, so there is nothing to average")
    bad = sum(_UNREADABLE in review for summary in summaries for review in summary.reviews)
    if bad:
        raise SomeRecordsFailed(f"{bad:,} reviews cannot be read, as said above")


def _apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """An option's words, one at least, and the files after them: `-i q1 reviews.jsonl`."""
    files = [word for word in words[1:] if word == "-" or _is_file(Path(word))]
    return [word for word in words if word not in files], files


def _is_file(path: Path) -> bool:
    return path.suffix in (".json", ".jsonl") or (path.exists() and not path.is_dir())


def _review(line: Line) -> Record:
    """A review; of a line that is none, a failed one with as much as can be told."""
    if line.problem is None:
        return line.record
    known = {"category": line.record.get("category"), "error": str(line.problem)}
    return {**known, _UNREADABLE: line.number}


def _renamed(summaries: Sequence[Summary], names: Sequence[str]) -> list[Summary]:
    if len(names) != len(summaries) + 1:
        raise UsageError(
            f"--names needs {len(summaries) + 1} names here, not {len(names)}",
            hint="the first answerer's, and the second one's of each pair",
        )
    return renamed(summaries, names)


def _compared(summaries: Sequence[Summary], baselines: Sequence[Summary]) -> list[Summary]:
    """Each run beside its baseline: the only one, or the one at its place among as many."""
    if len(baselines) == 1:
        baselines = [baselines[0]] * len(summaries)
    if len(baselines) != len(summaries):
        raise UsageError(
            f"the baseline has {len(baselines)} pairs of answer files, the reviews {len(summaries)}"
        )
    return [compare(run, other) for run, other in zip(summaries, baselines, strict=True)]


def _print(summaries: Sequence[Summary], form: str) -> None:
    if form == "table":
        tables.print_table(summaries, sys.stdout)
    elif form in ("markdown", "csv"):
        text = tables.markdown_table if form == "markdown" else tables.csv_table
        click.echo(text(summaries), nl=False)
    else:
        for row in (row for summary in summaries for row in summary.rows):
            figures = form == "figures"
            emit_record(row.figures(several=len(summaries) > 1) if figures else row.record())


def _say(summaries: Sequence[Summary], *, with_remarks: bool) -> None:
    """What the figures do not show, on stderr."""
    for line in tables.remarks(summaries) if with_remarks else ():
        note(line)
    for summary in summaries:
        reasons = list(summary.failures.items())
        for reason, count in reasons[:_REASONS_SHOWN]:
            note(f"{summary.name}: {count} failed, in no mean: {reason}")
        rest = sum(count for _, count in reasons[_REASONS_SHOWN:])
        if rest:
            note(f"{summary.name}: {rest} more failed, in no mean, for other reasons")


def _write_report(
    page: Path,
    summaries: Sequence[Summary],
    questions: Path | None,
    answers: Sequence[Path],
    media: dict[str, Any],
) -> None:
    from chatbind_cli.review.report.page import render_report  # noqa: PLC0415

    previews = None
    if media["media_root"].folder is not None:
        from chatbind_cli.review.report.previews import Previews  # noqa: PLC0415  brings torch

        limit = int(media["media_limit"] * 1e6)
        previews = Previews(media["media_root"], limit_bytes=limit)
    mismatches = Mismatches()
    chunks = render_report(
        summaries,
        questions=None if questions is None else records_by_id(questions, mismatches),
        answers=[records_by_id(path, mismatches) for path in answers],
        previews=previews,
    )
    with replace_file(page) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(chunks)
    if questions is None or not answers:
        note("report: --questions and --answers let it show what was asked and answered")
    for problem in [*mismatches.lines(), *(previews.problems if previews else [])]:
        note(f"report: {problem}")
    note(f"report: {page}")


def _sources(names: Sequence[str], folder: Path | None) -> list[str]:
    """The review files that are meant, by the words of the call or by where they usually are."""
    found = list(names)
    if folder is not None:
        found += _in_folder(folder)
        if not found:
            raise UsageError(f"no file named {' or '.join(_PATTERNS)}", where=str(folder))
    if not found and not sys.stdin.isatty():
        return ["-"]
    if not found:
        found = [path for name in _FOLDERS for path in _in_folder(Path(name))]
    if not found:
        raise UsageError(
            "no reviews: nothing on standard input, and no review files here",
            hint="name a file, a folder with --dir, or pipe `chatbind review` into it",
        )
    return found


def _in_folder(folder: Path) -> list[str]:
    paths = {path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return [str(path) for path in sorted(paths)]


def _names(sources: Sequence[str]) -> dict[str, str]:
    """What files' reviews are of: `gpt4_text_chatbind.jsonl` is about `chatbind`."""
    sources = list(dict.fromkeys(sources))
    short = [_name(source) for source in sources]
    tails = distinct_names(sources)
    return {
        source: legible(name if short.count(name) == 1 else tail)
        for source, name, tail in zip(sources, short, tails, strict=True)
    }


def _name(source: str) -> str:
    if source == "-":
        return "stdin"
    name = Path(source).name.partition(".json")[0]
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name or source

"""`chatbind summarize`: tabulate review records."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from chatbind_cli.artifacts import emit_record
from chatbind_cli.console import note
from chatbind_cli.errors import RecordError, UsageError
from chatbind_cli.files import replace_file
from chatbind_cli.jsonl import Record, read_records, record_id
from chatbind_cli.review import tables
from chatbind_cli.review.baseline import compare
from chatbind_cli.review.summary import Summary, summarize_pairs

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
    help="Questions to leave out.",
)
@_input(
    "--baseline",
    type=_FILE,
    help="Reviews of another run on the same questions: each line of the table is compared with "
    "that run's by a paired permutation test.",
)
@_output(
    "--by",
    type=click.Choice(["category", "modality", "judge"]),
    default="category",
    help="What makes a line of the table.",
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
    counted, and are in no mean.
    """
    summaries: list[Summary] = []
    for source in _sources([*reviews, *files], folder):
        found = _read(source, by, ignore, with_words=page is not None)
        if not found[0].reviews:
            where = "<stdin>" if source == "-" else source
            raise RecordError("holds no reviews", where=where, hint="see `chatbind review`")
        summaries += found
    if baseline is not None:
        summaries = _compared(summaries, _read(str(baseline), by, ignore, with_words=False))
    form = _form("figures" if as_json else form)
    _print(summaries, form)
    if page is not None:
        _write_report(page, summaries, questions, answers, media)
    _say(summaries, with_remarks=form in ("json", "figures", "csv"))
    if not any(row.n for summary in summaries for row in summary.rows):
        raise RecordError("every review failed, so there is nothing to average")


def _read(source: str, by: str, ignore: Sequence[str], *, with_words: bool) -> list[Summary]:
    """The figures of one file; of several pairs of answer files, one by one."""
    return summarize_pairs(
        (record for record, _ in read_records(source)),
        name=_name(source),
        by=by,
        ignore=ignore,
        with_words=with_words,
    )


def _compared(summaries: Sequence[Summary], baselines: Sequence[Summary]) -> list[Summary]:
    """Each run beside its baseline: the only one, or the one at its place among as many."""
    if len(baselines) == 1:
        baselines = [baselines[0]] * len(summaries)
    if len(baselines) != len(summaries):
        raise UsageError(
            f"the baseline has {len(baselines)} pairs of answer files, the reviews {len(summaries)}"
        )
    return [compare(run, other) for run, other in zip(summaries, baselines, strict=True)]


def _form(form: str) -> str:
    if form != "auto":
        return form
    return "table" if sys.stdout.isatty() else "json"


def _print(summaries: Sequence[Summary], form: str) -> None:
    if form in ("json", "figures"):
        several = len(summaries) > 1
        for summary in summaries:
            for row in summary.rows:
                emit_record(row.record() if form == "json" else row.figures(several=several))
    elif form == "table":
        tables.print_table(summaries, sys.stdout)
    else:
        text = tables.markdown_table if form == "markdown" else tables.csv_table
        click.echo(text(summaries), nl=False)


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
    from chatbind_cli.review.exhibits import Cabinet  # noqa: PLC0415  brings what it shows
    from chatbind_cli.review.report import render_report  # noqa: PLC0415

    cabinet = Cabinet(
        media["media_root"],
        prefix=media["media_prefix"],
        allow_outside=media["allow_outside"],
        limit_bytes=int(media["media_limit"] * 1e6),
    )
    chunks = render_report(
        summaries,
        questions=None if questions is None else _by_id(questions),
        answers=[_by_id(path) for path in answers],
        cabinet=cabinet,
    )
    with replace_file(page) as temporary, temporary.open("w", encoding="utf-8") as file:
        for chunk in chunks:
            file.write(chunk)
    if questions is None or not answers:
        note("report: --questions and --answers let it show what was asked and answered")
    for problem in cabinet.problems:
        note(f"report: {problem}")
    note(f"report: {page}")


def _by_id(path: Path) -> dict[str, Record]:
    return {str(record_id(record)): record for record, _ in read_records(path)}


def _sources(names: Sequence[str], folder: Path | None) -> list[str]:
    """The review files that are meant, by the words of the call or by where they usually are."""
    found = list(names)
    if folder is not None:
        found += _in_folder(folder)
        if not found:
            raise UsageError(f"no file named {' or '.join(_PATTERNS)}", where=str(folder))
    if found:
        return found
    if not sys.stdin.isatty():
        return ["-"]
    for name in _FOLDERS:
        found += _in_folder(Path(name))
    if not found:
        raise UsageError(
            "no reviews: nothing on standard input, and no review files here",
            hint="name a file, a folder with --dir, or pipe `chatbind review` into it",
        )
    return found


def _in_folder(folder: Path) -> Iterator[str]:
    paths = {path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return (str(path) for path in sorted(paths))


def _name(source: str) -> str:
    """What a file's reviews are of: `gpt4_text_chatbind.jsonl` is about `chatbind`."""
    if source == "-":
        return "stdin"
    name = Path(source).name.partition(".json")[0]
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name or source

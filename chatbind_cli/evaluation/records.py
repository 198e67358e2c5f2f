"""Review records: what is written for a verdict, and how a file of them is continued.

Hashes tell reviews apart. `review_id` names exactly what was judged (the question, both answers,
judge, rule, order, sample): a finished one is never paid for again. The review key
(`metadata.slot`) names the place that it fills in a report (all of these but the question's and
the answers' words and the rule's): of two reviews with the same key the later one counts, which is
how a changed answer replaces its old review. The input hash (`metadata.subject`: the words that
were judged) and the judge hash (`metadata.basis`: the judge's rule and settings) let a summary
leave out the old reviews of keys that the new run does not fill (`summary.latest`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatbind_cli.console import printable
from chatbind_cli.evaluation.cases import Judgement, digest
from chatbind_cli.evaluation.judges.judge import Verdict
from chatbind_cli.evaluation.scores import metadata_of, paid_usd
from chatbind_cli.files import replace_file
from chatbind_cli.json_text import lines, parse_line
from chatbind_cli.jsonl import Record


def review_record(judgement: Judgement, verdict: Verdict, *, earlier_usd: float = 0.0) -> Record:
    """The record of one judgement; with an `error` and without scores if it failed.

    What earlier reviews with its key cost stays in it.
    """
    case = judgement.case
    ids = [answer.get("answer_id") for answer in case.answers] or [None, None]
    metadata: dict[str, Any] = {
        "slot": judgement.review_key,
        "subject": judgement.input_hash,
        "basis": judgement.judge_hash,
        **({} if case.single else {"order": [2, 1] if judgement.swapped else [1, 2]}),
        "sample": judgement.sample,
        **verdict.metadata,
    }
    if earlier_usd:
        metadata["earlier_usd"] = round(earlier_usd, 8)
    if case.modality is not None:
        metadata["modality"] = case.modality
    if case.single:
        metadata["mode"] = "single"
    metadata["models"] = list(case.models)
    if case.pair is not None:
        metadata["pair"] = list(case.pair)
    if case.answers:
        metadata["answers"] = [digest(text) for text in case.texts]
        metadata["lengths"] = [len(text) for text in case.texts]
    record: Record = {
        "review_id": judgement.review_id,
        **({} if case.line is None else {"line": case.line}),
        "question_id": case.question_id,
        "answer1_id": ids[0],
        **({} if case.single else {"answer2_id": ids[1]}),
        "category": case.category,
        "content": verdict.content,
        "tuple": None if verdict.scores is None else list(verdict.scores),
        "reviewer_id": judgement.judge,
        "metadata": metadata,
    }
    if verdict.scores is None:
        record["error"] = verdict.error or "no scores"
    return record


def in_words(record: Record) -> str:
    """A review as a person reads it, in a line."""
    metadata = metadata_of(record)
    order = " (swapped)" if metadata.get("order") == [2, 1] else ""
    scores = " : ".join(f"{score:g}" for score in record.get("tuple") or ())
    verdict = scores or f"failed: {record.get('error')}"
    parts = (record.get("question_id"), record.get("category", ""), f"{verdict}{order}")
    return printable("  ".join(" ".join(str(part).split()) for part in parts))


@dataclass(frozen=True, slots=True)
class Earlier:
    """What earlier runs left in the output.

    Attributes:
        done: ids of the reviews that are there without an error.
        usd_by_key: what was paid for each review key, replaced and failed reviews included.
    """

    done: set[str] = field(default_factory=set)
    usd_by_key: dict[str, float] = field(default_factory=dict)


def read_earlier(path: Path) -> Earlier:
    """What a file holds; nothing where there is none."""
    earlier = Earlier()
    for record, _ in _with_bytes(path) if path.is_file() else ():
        metadata = metadata_of(record)
        key = str(metadata.get("slot"))
        paid = paid_usd(metadata)
        if paid is not None:
            # A review that came later with its key says itself what those before it cost.
            before = 0.0 if "earlier_usd" in metadata else earlier.usd_by_key.get(key, 0.0)
            earlier.usd_by_key[key] = before + paid
        if "error" not in record:
            earlier.done.add(_id(record))
    return earlier


def tidy(path: Path, judgements: Sequence[tuple[str, str]] = ()) -> None:
    """Puts a review file in order when the run has ended.

    First stay the records of other runs (another judge's, other answers'), then this run's, in the
    order of the questions; a record that another one has replaced goes, as a failed one does that
    was made again.

    Args:
        path: the review file, closed.
        judgements: `(review_id, review_key)` of this run in order, once it is complete.
    """
    place = {review_id: number for number, (review_id, _) in enumerate(judgements, start=1)}
    keys = {key for _, key in judgements}

    def holds(record: Record) -> bool:
        return _id(record) in place or metadata_of(record).get("slot") not in keys

    before: list[bytes] = []
    kept: dict[int, tuple[int, bytes]] = {}
    failed: dict[str, int] = {}
    for number, (record, line) in enumerate(_with_bytes(path)):
        before.append(line)
        review_id = _id(record)
        if review_id in failed:
            kept.pop(failed.pop(review_id), None)
        if holds(record):
            kept[number] = (place.get(review_id, 0), line)
        if "error" in record:
            failed[review_id] = number
    after = [line for _, line in sorted(kept.values(), key=lambda part: part[0])]
    if after != before:
        with replace_file(path) as temporary, temporary.open("wb") as file:
            file.writelines(after)


def _id(record: Record) -> str:
    return str(record.get("review_id"))


def _with_bytes(path: Path) -> Iterator[tuple[Record, bytes]]:
    """The records of a file, and their lines; `RecordWriter` refuses what is none."""
    with path.open("rb") as file:
        for line in lines(file, str(path)):
            record, _, _, problem = parse_line(line, str(path))
            if problem is None:
                yield record, line

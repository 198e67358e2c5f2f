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

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from chatbind_cli.console import printable
from chatbind_cli.evaluation.cases import Case, digest
from chatbind_cli.evaluation.judges.judge import Verdict
from chatbind_cli.evaluation.scores import metadata_of, paid_usd
from chatbind_cli.files import replace_file
from chatbind_cli.json_text import lines, parse_line
from chatbind_cli.jsonl import Line, Record, dumps


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One judgement to be made: a case, the order in which it is shown, and which sample it is."""

    case: Case
    swapped: bool
    sample: int
    judge: str
    judge_hash: str

    @cached_property
    def review_id(self) -> str:
        """The same for the same question, answers, judge, rule, order and sample."""
        return digest(self.review_key, self.input_hash, self.judge_hash)

    @cached_property
    def review_key(self) -> str:
        """The same for every review that fills this place in a report."""
        case = self.case
        about = [str(case.line or case.question_id), case.modality, list(case.models)]
        return digest(about, self.judge, self.swapped, self.sample)

    @cached_property
    def input_hash(self) -> str:
        """The same for the same words of question and answers."""
        question = {key: value for key, value in self.case.question.items() if key != "metadata"}
        return digest(question, self.case.texts, self.case.problem)


def review_record(judgement: Judgement, verdict: Verdict, *, earlier_usd: float = 0.0) -> Record:
    """The record of one judgement; with an `error` and without scores if it failed.

    Args:
        judgement: what was judged.
        verdict: what the judge said.
        earlier_usd: what earlier reviews with its key cost.
    """
    case = judgement.case
    answer_ids = [answer.get("answer_id") for answer in case.answers] or [None, None]
    metadata: dict[str, Any] = {
        "slot": judgement.review_key,
        "subject": judgement.input_hash,
        "basis": judgement.judge_hash,
        "order": [2, 1] if judgement.swapped else [1, 2],
        "sample": judgement.sample,
        **verdict.metadata,
    }
    if earlier_usd:
        metadata["earlier_usd"] = round(earlier_usd, 8)
    if case.modality is not None:
        metadata["modality"] = case.modality
    metadata["models"] = list(case.models)
    if case.pair is not None:
        metadata["pair"] = list(case.pair)
    if case.answers:
        metadata["answers"] = [digest(text) for text in case.texts]
    record: Record = {
        "review_id": judgement.review_id,
        **({} if case.line is None else {"line": case.line}),
        "question_id": case.question_id,
        "answer1_id": answer_ids[0],
        "answer2_id": answer_ids[1],
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
        failed: those with one, by their ids.
        usd_by_key: what was paid for each review key, replaced and failed reviews included.
    """

    done: set[str] = field(default_factory=set)
    failed: dict[str, Record] = field(default_factory=dict)
    usd_by_key: dict[str, float] = field(default_factory=dict)

    @property
    def spent_usd(self) -> float:
        """What was paid in all."""
        return sum(self.usd_by_key.values())


def read_earlier(path: Path) -> Earlier:
    """What a file holds; nothing where there is none."""
    earlier = Earlier()
    for (record, _, _, problem), _ in _spans(path) if path.is_file() else ():
        if problem is not None:
            continue  # `RecordWriter` says what is wrong with it
        metadata = metadata_of(record)
        key = str(metadata.get("slot"))
        paid = paid_usd(metadata)
        if paid is not None:
            # A review that came later with its key says itself what those before it cost.
            before = 0.0 if "earlier_usd" in metadata else earlier.usd_by_key.get(key, 0.0)
            earlier.usd_by_key[key] = before + paid
        if "review_id" not in record:
            continue
        if "error" in record:
            earlier.failed[str(record["review_id"])] = record
        else:
            earlier.done.add(str(record["review_id"]))
    return earlier


def tidy(
    path: Path, failed: Mapping[str, Record], judgements: Iterable[tuple[str, str]] = ()
) -> None:
    """Puts a review file in order when the run has ended.

    Opening a file to continue it drops what failed. But a run may end before it comes to them, and
    those of another judge are none of its own: they come back, so that they do not vanish from the
    count of failures. They come first: whatever else is there is newer, or as old. After them stay
    the records of other runs (another judge's, other answers'), then this run's, in the order of
    the questions; a record that another one has replaced goes.

    Args:
        path: the review file, closed.
        failed: what was there with an error when the run began, by id.
        judgements: `(review_id, review_key)` of this run in order, once it is complete.
    """
    place: dict[str, int] = {}
    keys: set[str] = set()
    for position, (review_id, key) in enumerate(judgements):
        place[review_id] = position
        keys.add(key)
    there: set[str] = set()
    # position, where it begins in the file, and where it ends there (or what it is)
    kept: list[tuple[int, int, bytes | int]] = []
    size = kept_size = 0
    for (record, *_), (start, size) in _spans(path):
        there.add(str(record.get("review_id")))
        position = place.get(str(record.get("review_id")), -1)
        if position >= 0 or _key(record) not in keys:
            kept.append((position, start, size))
            kept_size += size - start
    back: list[tuple[int, int, bytes | int]] = [
        # before the first byte of the file, so that each comes before what has the same position
        (place.get(review_id, -1), number - len(failed), f"{dumps(record)}\n".encode())
        for number, (review_id, record) in enumerate(failed.items())
        if review_id not in there and (review_id in place or _key(record) not in keys)
    ]
    ordered = sorted([*back, *kept], key=lambda part: part[:2])
    if ordered == kept and kept_size == size:
        return
    with replace_file(path) as temporary, path.open("rb") as old, temporary.open("wb") as new:
        for _, start, end in ordered:
            if isinstance(end, bytes):
                new.write(end)
            else:
                old.seek(start)
                new.write(old.read(end - start))


def _key(record: Record) -> object:
    return metadata_of(record).get("slot")


def _spans(path: Path) -> Iterator[tuple[Line, tuple[int, int]]]:
    """The lines of a file, and where each begins and ends."""
    end = 0
    with path.open("rb") as file:
        for line in lines(file, str(path)):
            start, end = end, end + len(line)
            yield parse_line(line, str(path)), (start, end)

"""Review records: what is written for a verdict, and which of them stand for the same thing.

Hashes tell reviews apart. `review_id` names exactly what was judged (the question, both answers,
judge, rule, order, sample): a finished one is never paid for again. `metadata.slot` names the
place that it fills in a report (all of these but the question's and the answers' words and the
rule's): of two reviews in the same slot the later one counts, which is how a changed answer
replaces its old review. `metadata.subject` (the words that were judged) and `metadata.basis` (the
judge's rule and settings) let a summary leave out the old reviews of slots that the new run does
not fill (`reading.latest`). Knows nothing of judges.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatbind_cli.console import printable
from chatbind_cli.files import replace_file
from chatbind_cli.jsonl import Record, dumps, read_lines
from chatbind_cli.review.cases import Case, digest
from chatbind_cli.review.judges import Verdict
from chatbind_cli.review.scores import metadata_of, paid_usd


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One judgement to be made: a case, the order in which it is shown, and which sample it is."""

    case: Case
    swapped: bool
    sample: int
    judge: str
    fingerprint: str

    @property
    def review_id(self) -> str:
        """The same for the same question, answers, judge, rule, order and sample."""
        return digest(self.slot, self.subject, self.fingerprint)

    @property
    def slot(self) -> str:
        """The same for every review that fills this place in a report."""
        case = self.case
        about = [str(case.line or case.question_id), case.modality, list(case.models)]
        return digest(about, self.judge, self.swapped, self.sample)

    @property
    def subject(self) -> str:
        """The same for the same words of question and answers."""
        question = {key: value for key, value in self.case.question.items() if key != "metadata"}
        return digest(question, self.case.texts, self.case.problem)


def review_record(task: Task, verdict: Verdict, *, earlier_usd: float = 0.0) -> Record:
    """The record of one judgement; with an `error` and without scores if it failed.

    Args:
        task: what was judged.
        verdict: what the judge said.
        earlier_usd: what earlier reviews in its slot cost.
    """
    case = task.case
    answer_ids = [answer.get("answer_id") for answer in case.answers] or [None, None]
    metadata: dict[str, Any] = {
        "slot": task.slot,
        "subject": task.subject,
        "basis": task.fingerprint,
        "order": [2, 1] if task.swapped else [1, 2],
        "sample": task.sample,
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
        "review_id": task.review_id,
        **({} if case.line is None else {"line": case.line}),
        "question_id": case.question_id,
        "answer1_id": answer_ids[0],
        "answer2_id": answer_ids[1],
        "category": case.category,
        "content": verdict.content,
        "tuple": None if verdict.scores is None else list(verdict.scores),
        "reviewer_id": task.judge,
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
        usd_by_slot: what was paid for each slot, replaced and failed reviews included.
    """

    done: set[str] = field(default_factory=set)
    failed: dict[str, Record] = field(default_factory=dict)
    usd_by_slot: dict[str, float] = field(default_factory=dict)

    @property
    def spent_usd(self) -> float:
        """What was paid in all."""
        return sum(self.usd_by_slot.values())


def read_earlier(path: Path | str) -> Earlier:
    """What a file holds; nothing where there is none."""
    earlier = Earlier()
    if str(path) == "-" or not Path(path).is_file():
        return earlier
    for record in _records(Path(path)):
        metadata = metadata_of(record)
        slot = str(metadata.get("slot"))
        paid = paid_usd(metadata)
        if paid is not None:
            # A review that came later in its slot says itself what those before it cost.
            before = 0.0 if "earlier_usd" in metadata else earlier.usd_by_slot.get(slot, 0.0)
            earlier.usd_by_slot[slot] = before + paid
        if "review_id" not in record:
            continue
        if "error" in record:
            earlier.failed[str(record["review_id"])] = record
        else:
            earlier.done.add(str(record["review_id"]))
    return earlier


def _records(path: Path) -> Iterator[Record]:
    """The records of a file; `RecordWriter` says what is wrong with its other lines."""
    return (line.record for line in read_lines(path) if line.problem is None)


def restore_failed(path: Path, failed: Mapping[str, Record]) -> None:
    """Puts the failed reviews of earlier runs that this one has not made again back.

    Opening a file to continue it drops what failed. But a run may end before it comes to them, and
    those of another judge are none of its own; they are not to vanish from the count of failures.
    They come first: whatever else is there is newer, or as old.

    Args:
        path: the review file, closed.
        failed: what was there with an error when the run began, by id.
    """
    there = {str(record.get("review_id")) for record in _records(path)} if failed else set()
    missing = [record for review_id, record in failed.items() if review_id not in there]
    if not missing:
        return
    with replace_file(path) as temporary, path.open("rb") as old, temporary.open("wb") as new:
        new.writelines(f"{dumps(record)}\n".encode() for record in missing)
        shutil.copyfileobj(old, new)


def put_in_order(path: Path, tasks: Sequence[tuple[str, str]]) -> None:
    """Puts a finished file's records into the order of the questions, whatever came first.

    Args:
        path: the review file, closed.
        tasks: `(review_id, slot)` of this run, in order.

    Records of other runs (another judge's, other answers') stay, before this run's; a record
    that another one has replaced in its slot goes. The file is left alone if it is in order.
    """
    place = {review_id: position for position, (review_id, _) in enumerate(tasks)}
    slots = {slot for _, slot in tasks}
    spans: list[tuple[int, int, int]] = []
    start = 0
    with path.open("rb") as file:
        for line in file:
            record = json.loads(line)
            position = place.get(record["review_id"], -1)
            if position >= 0 or record.get("metadata", {}).get("slot") not in slots:
                spans.append((position, start, start + len(line)))
            start += len(line)
    wanted = sorted(spans, key=lambda span: (span[0], span[1]))
    if wanted == spans and sum(end - begin for _, begin, end in spans) == start:
        return
    with replace_file(path) as temporary, path.open("rb") as old, temporary.open("wb") as new:
        for _, begin, end in wanted:
            old.seek(begin)
            new.write(old.read(end - begin))

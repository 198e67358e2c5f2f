"""Making the reviews that are missing, many at a time.

The caller's thread reads what is to be judged (it may wait for a pipe, and Ctrl-C must reach it
there); an event loop in a second thread talks to the judge and writes what comes back. However it
ends, judgements under way get a moment to finish, because they are paid for.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from chatbind_cli.console import note
from chatbind_cli.errors import ChatBindError, JudgeError, contained
from chatbind_cli.evaluation.cases import Case, Judgement, digest
from chatbind_cli.evaluation.judgement_cache import JudgementCache
from chatbind_cli.evaluation.judges.judge import Judge, Verdict
from chatbind_cli.evaluation.records import review_record
from chatbind_cli.evaluation.scores import paid_usd
from chatbind_cli.jsonl import RecordWriter
from chatbind_cli.loop_thread import cancel_others, loop_in_a_thread

Orders = Literal["as-given", "both", "random"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewOptions:
    """How often and in which order each case is judged.

    Attributes:
        orders: show the answers as given, in both orders (two reviews), or in an order drawn
            from the question's hash.
        samples: reviews a case and order.
        concurrency: most judgements at a time.
        on_error: write failed reviews, leave them out, or stop at the first.
        grace_s: longest wait for judgements under way when the run ends early.
        cache: the folder of judgements that other runs made, None for none.
        batch: ask in batches, and wait for them or leave.
    """

    orders: Orders = "both"
    samples: int = 1
    concurrency: int = 8
    on_error: Literal["record", "skip", "fail"] = "record"
    grace_s: float = 15.0
    cache: Path | None = None
    batch: Literal["wait", "leave"] | None = None


@dataclass(slots=True)
class Outcome:
    """What a run did.

    Attributes:
        reused: reviews that were already in the output.
        cached: how many of those judged are another run's judgements.
        judgements: `(review_id, review_key)` of all reviews, in the order of the cases.
        tokens: prompt and completion tokens that the judge says it used now.
        cost_usd: what they cost, as far as prices are known.
    """

    judged: int = 0
    reused: int = 0
    cached: int = 0
    failed: int = 0
    judgements: list[tuple[str, str]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    cost_usd: float = 0.0

    def text(self) -> str:
        """What was done, in one line."""
        parts = [f"{count_of(self.judged)} made"]
        if self.cached:
            parts[0] += f" ({self.cached:,} of them from the cache)"
        if self.reused:
            parts.append(f"{self.reused:,} were there already")
        if self.tokens[0]:
            parts.append(f"{self.tokens[0]:,} tokens sent, {self.tokens[1]:,} received")
        if self.cost_usd:
            parts.append(f"{self.cost_usd:.4f} USD")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        return ", ".join(parts)


def count_of(reviews: int) -> str:
    """So many reviews, in words."""
    return f"{reviews:,} {'review' if reviews == 1 else 'reviews'}"


def make_missing(
    judgements: Iterable[Judgement],
    judge: Judge,
    writer: RecordWriter,
    options: ReviewOptions,
    *,
    earlier_usd: Mapping[str, float] | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> Outcome:
    """Makes judgements, and writes a record for each as soon as it is made.

    Args:
        judgements: read as fast as the judge can follow.
        judge: asked, and closed at the end.
        writer: what it has `done` is not judged again.
        options: how many at a time, and what becomes of failures.
        earlier_usd: what earlier reviews cost, by review key; those that replace them say it.
        on_done: called after each judgement.

    Raises:
        JudgeError: the judge cannot work at all, or a review failed and `on_error` is `fail`.
    """
    outcome = Outcome()

    def missing() -> Iterator[Judgement]:
        for judgement in judgements:
            outcome.judgements.append((judgement.review_id, judgement.review_key))
            if judgement.review_id in writer.done:
                outcome.reused += 1
                on_done()
            else:
                yield judgement

    def finish(judgement: Judgement, verdict: Verdict) -> None:
        before = (earlier_usd or {}).get(judgement.review_key, 0.0)
        record = review_record(judgement, verdict, earlier_usd=before)
        outcome.tokens[0] += verdict.metadata.get("prompt_tokens", 0)
        outcome.tokens[1] += verdict.metadata.get("completion_tokens", 0)
        outcome.cost_usd += paid_usd(verdict.metadata) or 0.0
        failed = verdict.scores is None
        outcome.failed += failed
        outcome.judged += not failed
        outcome.cached += "cached" in verdict.metadata
        if failed and options.on_error == "fail":
            case = judgement.case
            where = f"question {case.question_id}" if case.line is None else None
            raise JudgeError(record["error"], where=where)
        if not failed or options.on_error == "record":
            writer.write(record)
        on_done()

    _judge_all(missing(), judge, finish, options)
    return outcome


def judgements_of(
    cases: Iterable[Case], judge: Judge, options: ReviewOptions
) -> Iterator[Judgement]:
    """The judgements that cases need; one that fails for a case that cannot be judged."""
    for case in cases:
        yield from _judgements_of(case, judge, options)


def _judgements_of(case: Case, judge: Judge, options: ReviewOptions) -> Iterator[Judgement]:
    judge_hash = ""
    if case.problem is None:
        try:
            judge_hash = judge.judge_hash(case)
        except Exception as error:
            what = contained(error, where=f"question {case.question_id}")
            case = replace(case, problem=str(what))
    if options.orders == "random":
        swaps: tuple[bool, ...] = (int(digest(case.question, case.texts)[:2], 16) % 2 == 1,)
    else:
        swaps = (False, True) if options.orders == "both" and case.line is None else (False,)
    # What has a problem fails in the same way in every sample.
    for sample in range(options.samples if case.problem is None else 1):
        for swapped in swaps:
            yield Judgement(
                case=case,
                swapped=swapped,
                sample=sample,
                judge=judge.name,
                judge_hash=judge_hash,
            )


def _judge_all(
    judgements: Iterable[Judgement],
    judge: Judge,
    finish: Callable[[Judgement, Verdict], None],
    options: ReviewOptions,
) -> None:
    """Has `finish` called with each verdict, one at a time; what it raises ends the run."""
    seats = threading.Semaphore(options.concurrency)
    cache = JudgementCache(options.cache)
    under_way: set[asyncio.Task[Any]] = set()
    errors: list[Exception] = []

    async def work(judgement: Judgement) -> None:
        task = cast(asyncio.Task[Any], asyncio.current_task())
        under_way.add(task)
        try:
            if not errors:
                finish(judgement, await _verdict(judgement, judge, cache))
        except Exception as error:
            errors.append(error)
        finally:
            under_way.discard(task)
            seats.release()

    with loop_in_a_thread("judge") as submit:
        try:
            for judgement in judgements:
                seats.acquire()
                if errors:
                    break
                submit(work(judgement))
            for _ in range(options.concurrency):
                if not errors:
                    seats.acquire()
        finally:
            try:
                submit(_settle(under_way, judge, options.grace_s)).result()
            finally:
                submit(_drop_all(judge)).result(timeout=10)
    if errors:
        raise errors[0]


async def _verdict(judgement: Judgement, judge: Judge, cache: JudgementCache) -> Verdict:
    case = judgement.case
    if case.problem is not None:
        return Verdict(error=case.problem)
    try:
        return await cache.verdict(judge, judgement)
    except ChatBindError:
        raise  # it is not about this case
    except Exception as error:
        return Verdict(error=str(contained(error, where=f"question {case.question_id}")))


async def _settle(under_way: set[asyncio.Task[Any]], judge: Judge, grace_s: float) -> None:
    """Starts nothing new, and gives what is sent its time to come back and be written."""
    sent = under_way & judge.sending
    for task in under_way - sent:
        task.cancel()
    if sent:
        note(
            f"ending: up to {grace_s:g} s for {len(sent)} judgements under way (Ctrl-C drops them)"
        )
        await asyncio.wait(sent, timeout=grace_s)


async def _drop_all(judge: Judge) -> None:
    await cancel_others()
    await judge.close()

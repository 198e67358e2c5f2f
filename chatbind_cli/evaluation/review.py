"""One review from its files to its last remark: what `chatbind review` does.

Which reviews are missing, who makes them, what they cost, and how they come to lie in the output
in the order of the questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from chatbind_cli.console import Progress, note
from chatbind_cli.errors import JudgeError, SomeRecordsFailed, UsageError, contained
from chatbind_cli.evaluation.cases import Case, Inputs, digest
from chatbind_cli.evaluation.judges.cost import FREE, Plan
from chatbind_cli.evaluation.judges.judge import Judge, JudgeSettings, Verdict
from chatbind_cli.evaluation.judges.rule import RuleJudge
from chatbind_cli.evaluation.judging import judge_all
from chatbind_cli.evaluation.records import (
    Earlier,
    Judgement,
    in_words,
    read_earlier,
    review_record,
    tidy,
)
from chatbind_cli.evaluation.scores import paid_usd
from chatbind_cli.jsonl import RecordWriter

Orders = Literal["as-given", "both", "random"]
_MISFIT = "the files do not fit together, as said above"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewOptions:
    """How often and in which order each case is judged.

    Attributes:
        orders: show the answers as given, in both orders (two reviews), or in an order drawn
            from the question's hash; None for what suits the judge.
        samples: reviews a case and order.
        on_error: write failed reviews, leave them out, or stop at the first.
        grace_s: longest wait for judgements under way when the run ends early.
    """

    orders: Orders | None = None
    samples: int = 1
    on_error: Literal["record", "skip", "fail"] = "record"
    grace_s: float = 15.0


@dataclass(slots=True)
class Outcome:
    """What a run did.

    Attributes:
        judged: reviews made now.
        reused: reviews that were already in the output.
        failed: reviews without scores.
        judgements: `(review_id, review_key)` of all of them, in the order of the cases.
        tokens: prompt and completion tokens that the judge says it used now.
        cost_usd: what they cost, as far as prices are known.
    """

    judged: int = 0
    reused: int = 0
    failed: int = 0
    judgements: list[tuple[str, str]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    cost_usd: float = 0.0

    def text(self) -> str:
        """What was done, in one line."""
        parts = [f"{count_of(self.judged)} made"]
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


class Review:
    """A review that is ready to be planned or made.

    Args:
        inputs: questions and answers.
        settings: who judges.
        options: how often.
        output: the review file, `-` for standard output.
        overwrite: start it anew.
        will_ask: whether it will be made, not only planned.

    Raises:
        UsageError: the rule judge has nothing to compare with.
        ChatBindError: a file cannot be read, or there is no such judge.
    """

    def __init__(
        self,
        inputs: Inputs,
        settings: JudgeSettings,
        options: ReviewOptions,
        *,
        output: str = "-",
        overwrite: bool = False,
        will_ask: bool = True,
    ) -> None:
        if settings.is_rule and not inputs.has_references():
            raise UsageError(
                "the rule judge compares with right answers, and no question has an `answer`",
                where=inputs.name,
                hint="give --reference FILE (an answer file will do), or another --judge",
            )
        self._inputs = inputs
        self._settings = settings
        default: Orders = "as-given" if settings.is_rule else "both"
        self._options = replace(options, orders=options.orders or default)
        self._output, self._overwrite = output, overwrite
        self._earlier = Earlier() if overwrite else read_earlier(Path(output))
        self._judge = _open_judge(settings, self._earlier.spent_usd, will_ask)

    def plan(self) -> Plan:
        """What `make` would do and cost; `refuse_misfit` then says whether the files fit."""
        judge = self._judge
        plan = Plan(judge=judge.name, counted_by=judge.counted_by)
        for case in self._inputs.cases():
            tokens = None
            for judgement in judgements_of(case, judge, self._options):
                plan.judgements += 1
                if judgement.review_id in self._earlier.done:
                    plan.done += 1
                elif judgement.case.problem is not None:
                    plan.failing += 1
                else:
                    tokens = tokens or judge.expected_tokens(case)
                    if tokens is not None:
                        plan.add_request(*tokens)
        if judge.price is not None:
            plan.reckon(judge.price)
        for remark in self._inputs.remarks:
            note(remark)
        return plan

    def refuse_misfit(self) -> None:
        """Ends a plan as the run would end.

        Raises:
            SomeRecordsFailed: the files do not fit together.
        """
        if self._inputs.remarks:
            raise SomeRecordsFailed(_MISFIT)

    def make(self) -> None:
        """Makes what is missing in the output.

        Raises:
            SomeRecordsFailed: a review failed, or the files do not fit together.
            JudgeError: the judge cannot work at all, or a review failed and `on_error` is `fail`.
        """
        self._introduce()
        path = Path(self._output)
        writer = RecordWriter(
            self._output, key="review_id", overwrite=self._overwrite, in_words=in_words
        )
        outcome = Outcome()
        try:
            with writer, Progress(self._n_expected(), "judging", "reviews") as progress:
                outcome = make_missing(
                    self._inputs.cases(),
                    self._judge,
                    writer,
                    self._options,
                    concurrency=1 if self._settings.is_rule else self._settings.concurrency,
                    earlier_usd=self._earlier.usd_by_key,
                    on_done=progress.advance,
                )
        finally:
            if path.is_file():  # not a pipe or a device
                tidy(path, self._earlier.failed, outcome.judgements)
        self._conclude(outcome)

    def _introduce(self) -> None:
        judge, settings = self._judge, self._settings
        note(f"judge: {judge.name}")
        if settings.max_cost_usd is not None and judge.price not in (None, FREE):
            note(f"price: {judge.price.text()}")
        if self._options.samples > 1 and not settings.is_rule and settings.temperature == 0:
            note("--samples asks for the same words again and again unless --temperature is > 0")

    def _n_expected(self) -> int:
        per_pair = self._options.samples * (2 if self._options.orders == "both" else 1)
        return len(self._inputs.questions) * (len(self._inputs.names) - 1) * per_pair

    def _conclude(self, outcome: Outcome) -> None:
        """Says what was done and decides the exit code."""
        remarks = self._inputs.remarks
        for remark in remarks:
            note(remark)
        note(outcome.text())
        what = [f"{count_of(outcome.failed)} failed"] if outcome.failed else []
        what += [_MISFIT] if remarks else []
        if what:
            raise SomeRecordsFailed(" and ".join(what))


def _open_judge(settings: JudgeSettings, spent_usd: float, will_ask: bool) -> Judge:
    if settings.is_rule:
        return RuleJudge()
    from chatbind_cli.evaluation.judges.chat import ChatJudge  # noqa: PLC0415  brings openai

    return ChatJudge(settings, spent_usd=spent_usd, will_ask=will_ask)


def make_missing(
    cases: Iterable[Case],
    judge: Judge,
    writer: RecordWriter,
    options: ReviewOptions,
    *,
    concurrency: int = 8,
    earlier_usd: Mapping[str, float] | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> Outcome:
    """Judges all cases, and writes a record for each judgement as soon as it is made.

    Args:
        cases: what is to be judged; read as fast as the judge can follow.
        judge: the judge.
        writer: where the records go; what it has `done` is not judged again.
        options: how often and in which order.
        concurrency: judgements under way at the same time.
        earlier_usd: what earlier reviews cost, by review key; those that replace them say it.
        on_done: called after each judgement.

    Raises:
        JudgeError: the judge cannot work at all, or a review failed and `on_error` is `fail`.
    """
    outcome = Outcome()

    def missing() -> Iterator[Judgement]:
        for case in cases:
            for judgement in judgements_of(case, judge, options):
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
        if failed and options.on_error == "fail":
            case = judgement.case
            where = f"question {case.question_id}" if case.line is None else None
            raise JudgeError(record["error"], where=where)
        if not failed or options.on_error == "record":
            writer.write(record)
        on_done()

    judge_all(missing(), judge, finish, concurrency=concurrency, grace_s=options.grace_s)
    return outcome


def judgements_of(case: Case, judge: Judge, options: ReviewOptions) -> Iterator[Judgement]:
    """The judgements that one case needs; one that fails if it cannot be judged."""
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

"""One review from its files to its last remark: what `chatbind review` does when it is called.

Puts the other parts together (`cases`, `choosing`, `run`, `plan`, `records`) and says on stderr
what it did. Knows nothing of the words of the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from chatbind_cli.console import Progress, note
from chatbind_cli.errors import SomeRecordsFailed, UsageError
from chatbind_cli.jsonl import RecordWriter
from chatbind_cli.review.cases import Inputs, Source, read_inputs
from chatbind_cli.review.choosing import Chosen, JudgeSettings, choose, resolve
from chatbind_cli.review.paid import PaidLog
from chatbind_cli.review.plan import Plan, make_plan
from chatbind_cli.review.records import (
    Earlier,
    in_words,
    put_in_order,
    read_earlier,
    restore_failed,
)
from chatbind_cli.review.run import Orders, Outcome, RunOptions, count_of, run_reviews

_MISFIT = "the files do not fit together, as said above"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewFiles:
    """What is read and what is written.

    Attributes:
        questions: the question records.
        answers: two or more answer files, the baseline first; one may be a stream.
        contexts: captions and boxes, for a judge who cannot perceive the media.
        references: right answers, for the rule judge.
        output: the review file, `-` for standard output.
        overwrite: start the output anew.
    """

    questions: Path
    answers: Sequence[Path | str | Source]
    contexts: Path | None = None
    references: Path | None = None
    output: str = "-"
    overwrite: bool = False


class ReviewJob:
    """A review that is ready to be planned or run.

    Args:
        files: what is read and written.
        settings: who judges.
        options: how often and how many at a time; adapted to the judge.
        orders: which orders; None for what suits the judge.
        will_ask: whether it will be run, not only planned.

    Raises:
        UsageError: the rule judge has nothing to compare with.
        ChatBindError: a file cannot be read, or there is no such judge.
    """

    def __init__(
        self,
        files: ReviewFiles,
        settings: JudgeSettings,
        options: RunOptions,
        *,
        orders: Orders | None = None,
        will_ask: bool = True,
    ) -> None:
        self.files = files
        self.settings = settings
        # Context is for a judge who reads it; a rule that compares words needs none.
        is_rule = resolve(settings) == "rule"
        self.inputs: Inputs = read_inputs(
            files.questions,
            files.answers,
            contexts=None if is_rule else files.contexts,
            references=files.references,
        )
        if is_rule and not self.inputs.has_references():
            raise UsageError(
                "the rule judge compares with right answers, and no question has an `answer`",
                where=str(files.questions),
                hint="give --reference FILE (an answer file will do), or another --judge",
            )
        self._earlier = Earlier() if files.overwrite else read_earlier(files.output)
        output = Path(files.output)
        grows = files.output != "-" and (output.is_file() or not output.exists())
        # Beside a pipe or a device there is no place for it.
        self._paid = PaidLog(output) if grows else None
        spent = 0.0
        if not files.overwrite:
            spent = max(self._earlier.spent_usd, self._paid.total_usd() if self._paid else 0.0)
        self._chosen: Chosen = choose(
            settings,
            spent_usd=spent,
            on_paid=self._paid.add if self._paid else lambda usd: None,
            will_ask=will_ask,
        )
        self.options = replace(
            options,
            orders=orders or ("as-given" if is_rule else "both"),
            concurrency=1 if is_rule else settings.concurrency,
            earlier_usd=self._earlier.usd_by_slot,
        )

    def plan(self) -> Plan:
        """What `run` would do and cost; `refuse_misfit` then says whether the files fit."""
        chosen = self._chosen
        plan = make_plan(
            self.inputs.cases(),
            chosen.judge,
            self.options,
            done=self._earlier.done,
            price=chosen.price,
            counted_by=chosen.counted_by,
        )
        for remark in self.inputs.remarks:
            note(remark)
        return plan

    def refuse_misfit(self) -> None:
        """Ends a plan as the run would end.

        Raises:
            SomeRecordsFailed: the files do not fit together.
        """
        if self.inputs.remarks:
            raise SomeRecordsFailed(_MISFIT)

    def run(self) -> None:
        """Makes what is missing in the output.

        Raises:
            SomeRecordsFailed: a review failed, or the files do not fit together.
            JudgeError: the judge cannot work at all.
        """
        self._introduce()
        path = Path(self.files.output)
        try:
            outcome = self._judge_all()
        finally:
            if path.is_file():  # not a pipe or a device
                restore_failed(path, self._earlier.failed)
        if path.is_file():
            put_in_order(path, outcome.tasks)
        self._conclude(outcome)

    def _judge_all(self) -> Outcome:
        files = self.files
        with (
            RecordWriter(
                files.output, key="review_id", overwrite=files.overwrite, in_words=in_words
            ) as writer,
            Progress(self._n_expected(), "judging", "reviews") as progress,
        ):
            if self._paid is not None and files.overwrite:
                self._paid.forget()
            cases, judge = self.inputs.cases(), self._chosen.judge
            return run_reviews(cases, judge, writer, self.options, on_done=progress.advance)

    def _introduce(self) -> None:
        chosen, settings = self._chosen, self.settings
        note(f"judge: {chosen.judge.name}")
        if settings.max_cost_usd is not None and chosen.price is not None and not chosen.is_free:
            note(f"price: {chosen.price.text()}")
        if self.options.samples > 1 and not chosen.is_rule and settings.temperature == 0:
            note("--samples asks for the same words again and again unless --temperature is > 0")

    def _n_expected(self) -> int:
        pairs = len(self.inputs.answers) - 1
        per_pair = self.options.samples * (2 if self.options.orders == "both" else 1)
        return len(self.inputs.questions) * pairs * per_pair

    def _conclude(self, outcome: Outcome) -> None:
        """Says what was done and decides the exit code."""
        remarks = self.inputs.remarks
        for remark in remarks:
            note(remark)
        note(outcome.text())
        what = [f"{count_of(outcome.failed)} failed"] if outcome.failed else []
        what += [_MISFIT] if remarks else []
        if what:
            raise SomeRecordsFailed(" and ".join(what))

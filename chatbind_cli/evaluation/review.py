"""One review from its files to its last remark: what `chatbind review` does.

Which reviews are missing, who makes them, what they cost, and how they come to lie in the output
in the order of the questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from chatbind_cli.console import Progress, note
from chatbind_cli.cost import FREE, SHARE_OF_BATCHES, USUAL_REVIEW_TOKENS, Plan
from chatbind_cli.errors import ChatBindError, SomeRecordsFailed, UsageError
from chatbind_cli.evaluation.cases import Inputs, Judgement
from chatbind_cli.evaluation.judgement_cache import JudgementCache
from chatbind_cli.evaluation.judges.judge import Judge, JudgeSettings, RuleJudge
from chatbind_cli.evaluation.judging import (
    Outcome,
    ReviewOptions,
    count_of,
    judgements_of,
    make_missing,
)
from chatbind_cli.evaluation.records import Earlier, in_words, read_earlier, tidy
from chatbind_cli.jsonl import RecordWriter

if TYPE_CHECKING:
    from chatbind_cli.evaluation.batched import BatchedReplies


class Review:
    """A review that is ready to be planned or made.

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
    ) -> None:
        if settings.is_rule and not inputs.has_references():
            raise UsageError(
                "the rule judge compares with right answers, and no question has an `answer`",
                where=inputs.name,
                hint="give --reference FILE (an answer file will do), or another --judge",
            )
        stream = output == "-" or (Path(output).exists() and not Path(output).is_file())
        if options.batch and (settings.is_rule or stream):
            raise UsageError("--batch goes with a chat model as the judge, and --output FILE")
        self._inputs, self._settings, self._options = inputs, settings, options
        self._output, self._overwrite = output, overwrite
        self._earlier = Earlier() if overwrite else read_earlier(Path(output))
        self._held: ChatBindError | None = None
        self._judge: Judge = RuleJudge()
        if not settings.is_rule:
            from chatbind_cli.evaluation.judges.chat import ChatJudge  # noqa: PLC0415  brings openai

            spent_usd = sum(self._earlier.usd_by_key.values())
            self._judge = ChatJudge(settings, spent_usd=spent_usd)

    def plan(self) -> Plan:
        """What `make` would do and cost."""
        judge = self._judge
        plan = Plan(model=judge.name, counted_by=judge.counted_by)
        cache, asked = JudgementCache(self._options.cache), set[str | None]()
        for judgement in self._judgements():
            plan.records += 1
            if judgement.review_id in self._earlier.done:
                plan.done += 1
            elif judgement.case.problem is not None:
                plan.failing += 1
            elif (key := cache.key(judge, judgement)) is not None and (
                key in asked or cache.find(key, judgement) is not None
            ):
                plan.done += 1
            else:
                asked.add(key)
                tokens = judge.expected_tokens(judgement.case)
                if tokens is not None:
                    plan.add(tokens[0], USUAL_REVIEW_TOKENS, tokens[1])
        plan.set_price(judge.price, SHARE_OF_BATCHES if self._options.batch else 1.0)
        return plan

    def make(self) -> Outcome:
        """Makes what is missing in the output.

        Raises:
            JudgeError: the judge cannot work at all, or a review failed and `on_error` is `fail`.
        """
        self._settings.refuse_without_key()
        self._introduce()
        options = self._options
        per_pair = options.samples * (2 if options.orders == "both" else 1)
        n_expected = len(self._inputs.questions) * len(self._inputs.sides) * per_pair
        path = Path(self._output)
        # What failed is only replaced, as it was paid for and may be another judge's; see `tidy`.
        writer = RecordWriter(
            self._output,
            key="review_id",
            overwrite=self._overwrite,
            keep_failed=True,
            in_words=in_words,
        )
        outcome = Outcome()
        judgements: Iterable[Judgement] = self._judgements()
        try:
            with writer, Progress(n_expected, "judging", "reviews") as progress:
                replies = self._batched_replies()
                if replies is not None:
                    wait = options.batch == "wait"
                    judgements = replies.fetch(judgements, writer.done, wait=wait)
                    self._held = replies.held
                outcome = make_missing(
                    judgements,
                    self._judge,
                    writer,
                    options,
                    earlier_usd=self._earlier.usd_by_key,
                    on_done=progress.advance,
                )
                if replies is not None:
                    replies.forget()
        finally:
            if path.is_file():  # not a pipe or a device
                tidy(path, () if self._held else outcome.judgements)
        return outcome

    def conclude(self, outcome: Outcome | None = None) -> None:
        """Says what did not fit together and what `make` has done, and decides the exit code.

        Raises:
            SomeRecordsFailed: a review failed, or the files do not fit together.
            ChatBindError: reviews wait for their batches, or for a higher limit on the cost.
        """
        what = []
        for remark in self._inputs.remarks:
            note(remark)
        if outcome is not None:
            note(outcome.text())
            if outcome.failed:
                what.append(f"{count_of(outcome.failed)} failed")
        if self._inputs.remarks:
            what.append("the files do not fit together, as said above")
        if self._held:
            raise self._held
        if what:
            raise SomeRecordsFailed(" and ".join(what))

    def _judgements(self) -> Iterator[Judgement]:
        return judgements_of(self._inputs.cases(), self._judge, self._options)

    def _batched_replies(self) -> BatchedReplies | None:
        if self._options.batch is None:
            return None
        from chatbind_cli.evaluation.batched import BatchedReplies  # noqa: PLC0415  brings openai

        cache = JudgementCache(self._options.cache)
        return BatchedReplies(cast(Any, self._judge), Path(self._output), cache)

    def _introduce(self) -> None:
        judge, settings = self._judge, self._settings
        note(f"judge: {judge.name}")
        if settings.max_cost_usd is not None and judge.price not in (None, FREE):
            note(f"price: {judge.price.text()}")
        if self._options.samples > 1 and not settings.is_rule and settings.temperature == 0:
            note("--samples asks for the same words again and again unless --temperature is > 0")

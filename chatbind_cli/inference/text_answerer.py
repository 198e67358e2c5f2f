"""Answers from captions and boxes: a hosted chat model in place of one that perceives.

It is LLaVA's baseline (its text-only GPT-4): what can be answered without seeing or hearing. The
model reads the contexts that a judge reads, in the same words (`evaluation/contexts.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from chatbind_cli.console import note
from chatbind_cli.cost import FREE, Plan, message_tokens
from chatbind_cli.data.work_queue import Worker
from chatbind_cli.errors import EngineError, RecordError, UsageError
from chatbind_cli.evaluation.contexts import Contexts, context_text
from chatbind_cli.evaluation.files import Mismatches
from chatbind_cli.evaluation.scores import metadata_of, paid_usd
from chatbind_cli.files import sha256_file
from chatbind_cli.hosted import AnswererSettings, Message, Role, refuse_without_key
from chatbind_cli.hosted_model import HostedModel, NoReplyError
from chatbind_cli.inbox import Inbox
from chatbind_cli.inference.answer_record import AnswerRecords
from chatbind_cli.inference.decoding import FinishReason, Generated, Outcome
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.question_record import read_question
from chatbind_cli.inference.questions import Question, open_questions, where_of
from chatbind_cli.inference.together import answered_together
from chatbind_cli.inference.vqa import answer_file
from chatbind_cli.jsonl import read_lines
from chatbind_cli.loop_thread import loop_in_a_thread
from chatbind_cli.media.medium import Medium
from chatbind_cli.model.turns import HUMAN, dialogue
from chatbind_cli.worker_pool import WorkerPool

ANSWERER = Role("answerer", "answered", EngineError)
USUAL_ANSWER_TOKENS = 100
"""A few sentences; GPT-4's published answers to LLaVA's 90 questions have about 95."""

_VERSION = 1  # part of every answer's metadata: raise it when the words below change
_SYSTEM = (
    "You answer questions about media (pictures, videos, sounds, depth maps, thermal pictures, "
    "motion recordings) that you cannot perceive yourself. In place of each stands what is known "
    "of it, below its name in square brackets: captions by people who perceived it, then objects "
    "in it with their boxes [x1, y1, x2, y2] (left, top, right and bottom, as shares of its width "
    "and height). Answer directly, as if you perceived the media, and never mention captions, "
    "boxes or coordinates."
)


class TextAnswerer:
    """A hosted model that answers questions, many at a time.

    Args:
        spent_usd: what the answers that are there cost, for the cost limit.

    Attributes:
        identity: what the metadata of all answers say of it.

    Raises:
        ChatBindError: there is no such file, tokenizer or price.
    """

    def __init__(self, settings: AnswererSettings, *, spent_usd: float = 0.0) -> None:
        name, usual = str(settings.model), USUAL_ANSWER_TOKENS
        self.model = HostedModel(name, settings, ANSWERER, usual_tokens=usual, spent_usd=spent_usd)
        self.identity: dict[str, Any] = {"answerer": f"openai-{_VERSION}"}
        self._contexts: Contexts | None = None
        if settings.contexts is not None:
            mismatches = Mismatches()
            self._contexts = Contexts(settings.contexts, mismatches)
            self.identity["contexts"] = sha256_file(settings.contexts)[:12]
            for remark in mismatches.lines():
                note(remark)
        self._concurrency = settings.concurrency

    def run(
        self, questions: Inbox[Question], settings: GenerationSettings
    ) -> Iterator[tuple[Question, Outcome]]:
        """Answers questions as they come, each as soon as it is done, in any order.

        Yields:
            Each question, and its answer, or why there is none.

        Raises:
            ChatBindError: no more can be answered; or the error that the questions ended with.
                Either comes once those under way are answered: they are paid for.
        """
        with loop_in_a_thread("answerer") as submit:
            try:
                yield from answered_together(
                    questions,
                    lambda question: self._outcome(question, settings),
                    submit,
                    at_a_time=self._concurrency,
                    fatal=EngineError,
                )
            finally:
                submit(self.model.close()).result()

    async def _outcome(self, question: Question, settings: GenerationSettings) -> Outcome:
        """What becomes of a question.

        Raises:
            EngineError: nothing can become of any.
        """
        where = where_of(question)
        try:
            messages, parameters = self.request(question, settings)
            about: dict[str, Any] = {}
            text, ended = await self.model.ask(messages, parameters, about)
        except NoReplyError as error:
            return EngineError(str(error), where=where)
        except RecordError as error:
            return RecordError(error.what, where=error.where or where, hint=error.hint)
        tokens = about.get("completion_tokens") or self.model.count(text)
        why: FinishReason = "length" if ended == "length" else "stop"
        return Generated(text.strip(), tokens, why, about=about)

    def request(
        self, question: Question, settings: GenerationSettings
    ) -> tuple[list[Message], dict[str, Any]]:
        """The chat that asks a question, and how it is to be answered.

        Raises:
            ChatBindError: its `problem`, or it cannot be asked.
        """
        if question.problem is not None:
            raise question.problem
        if question.mix or any(medium.weight != 1.0 for medium in question.media):
            raise RecordError("mix and weights are for a model that perceives")
        messages = []
        number = 0
        turns = question.turns or dialogue(question.earlier, question.text, question.media)
        for turn in turns:
            told, said = [], []
            for part in turn.content:
                if isinstance(part, Medium):
                    number += 1
                    name = f"[{part.modality} {number}]"
                    told.append(f"{name}\n{self._context(part)}\n\n")
                    said.append(name)
                else:
                    said.append(part)
            role = "user" if turn.role == HUMAN else "assistant"
            messages.append({"role": role, "content": "".join([*told, *said])})
        system = question.system or (_SYSTEM if number else None)
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            return messages, _parameters(question.settings or settings)
        except UsageError as error:
            raise RecordError(f"generation: {error.what}", hint=error.hint) from error

    def _context(self, medium: Medium) -> str:
        found = None
        if self._contexts is not None:
            found = self._contexts.of(str(medium.modality), medium.name)
        if found is None:
            hint = None if self._contexts else "--context FILE says what is known of media"
            raise RecordError(f"no context for {medium.modality} {medium.name}", hint=hint)
        return context_text(found)


def _parameters(settings: GenerationSettings) -> dict[str, Any]:
    """The settings in the words of the endpoint.

    Raises:
        UsageError: there is none for one of them.
    """
    settings.refuse_hosted()
    parameters: dict[str, Any] = {
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
    }
    if settings.sampled:
        parameters |= {"top_p": settings.top_p, "seed": settings.seed}
    if settings.stop:
        parameters["stop"] = list(settings.stop)
    return parameters


def vqa_from_contexts(
    hosted: AnswererSettings,
    settings: GenerationSettings,
    *,
    output: str,
    overwrite: bool,
    **how: Any,
) -> None:
    """Has a hosted model answer a file of questions; see `vqa.answer_file`.

    Raises:
        SomeRecordsFailed: some of them could not be answered.
        ChatBindError: none can be, or no more within the cost limit.
    """
    refuse_without_key(hosted, ANSWERER)
    _, spent_usd = _earlier(output, overwrite)
    answerer = TextAnswerer(hosted, spent_usd=spent_usd)
    price = answerer.model.price
    if hosted.max_cost_usd is not None and price is not None and price is not FREE:
        note(f"price: {price.text()}")
    worker = Worker(
        partial(answerer.run, settings=settings),
        room=hosted.concurrency,
        said={
            "model_id": answerer.model.name,
            "metadata": {**answerer.identity, **settings.as_record()},
        },
    )
    answer_file(
        lambda: worker, settings, output=output, overwrite=overwrite, pool=WorkerPool(), **how
    )


def plan_from_contexts(
    hosted: AnswererSettings,
    settings: GenerationSettings,
    *,
    questions: str,
    shard: tuple[int, int],
    limit: int | None,
    output: str,
    overwrite: bool,
) -> Plan:
    """What `vqa_from_contexts` would ask and cost."""
    done, _ = _earlier(output, overwrite)
    answerer = TextAnswerer(hosted)
    plan = Plan(model=answerer.model.name, counted_by=answerer.model.counted_by)
    for line in islice(open_questions(questions, shard), limit):
        plan.records += 1
        question = read_question(line, settings)
        if question.line is None and str(question.id) in done:
            plan.done += 1
            continue
        try:
            messages, asked = answerer.request(question, settings)
        except Exception:  # what is wrong with it is said when it is asked
            plan.failing += 1
        else:
            sent = message_tokens(messages, answerer.model.count)
            plan.add(sent, USUAL_ANSWER_TOKENS, asked["max_tokens"])
    plan.set_price(answerer.model.price)
    return plan


def _earlier(output: str, overwrite: bool) -> tuple[set[str], float]:
    """The questions that the output answers already, and what that has cost in US dollars."""
    done: set[str] = set()
    spent = 0.0
    if output != "-" and not overwrite and Path(output).is_file():
        for record, _, _, problem in read_lines(output):  # the writer says what is wrong with it
            if problem is None and "error" not in record:
                done.add(str(record.get(AnswerRecords.key)))
                spent += paid_usd(metadata_of(record)) or 0.0
    return done, spent

"""The engine here: a ChatBind model in this process, with a batch whose rows come and go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import Any

import torch

from chatbind_cli.console import note
from chatbind_cli.data.encoding import GPU_FAILED
from chatbind_cli.errors import RecordError
from chatbind_cli.inbox import Inbox
from chatbind_cli.inference.asks import Ask
from chatbind_cli.inference.choices import likeliest
from chatbind_cli.inference.decoding import AnswerDecoder, Generated, Outcome
from chatbind_cli.inference.dialogue import Dialogue
from chatbind_cli.inference.engine import context_length, room_for_answer
from chatbind_cli.inference.fixed_batches import FixedBatches
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.prefill import Prefill, longest_together, row_obstacle
from chatbind_cli.inference.questions import Question
from chatbind_cli.inference.sampling import NOT_FINITE, choose
from chatbind_cli.inference.schedule import Schedule, failure, out_of_memory
from chatbind_cli.model.config import end_ids


class LocalEngine:
    """A ChatBind model that answers prompts.

    How is decided by `GenerationSettings` alone: of the model's own generation settings only the
    end tokens count, and the others are dropped from it.

    Args:
        model: the model, on its device.
        tokenizer: of the model.
        stop_ids: tokens that end an answer in the prompt style, beside the model's own.
        stops: texts that do.
        batch_size: most answers that are made together.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        stop_ids: Sequence[int],
        stops: Sequence[str] = (),
        batch_size: int = 16,
    ) -> None:
        self._model = model
        self._batch_size = batch_size
        ends = sorted({*stop_ids, *end_ids(model.generation_config.eos_token_id)})
        # `generate` fills from these whatever a call's own settings leave open
        model.generation_config = model.config.generation(ends)
        never = model.generation_config.suppress_tokens
        self._never = None if never is None else torch.tensor(never, device=model.device)
        self._decoder = lru_cache(maxsize=256)(
            lambda stop: AnswerDecoder(tokenizer, ends, (*stops, *stop))
        )
        self.longest_context = context_length(model.config)
        pad = tokenizer.pad_token_id
        self._fixed = FixedBatches(model, pad if pad is not None else ends[0])
        self._prefill = Prefill(model)
        self._longest_together = longest_together(model.config.text_config)
        self._dialogues: list[Dialogue] = []

    def identity(self) -> dict[str, Any]:
        """What the metadata of answers say of it: nothing that they do not say of the model."""
        return {}

    def run(
        self, questions: Inbox[Question], settings: GenerationSettings
    ) -> Iterator[tuple[Question, Outcome]]:
        """Answers prepared questions; see `Engine`."""
        schedule = Schedule(
            questions,
            asks=partial(self._asks, settings=settings),
            by_rows=self._by_rows,
            others=self._others,
            prefill=self._prefill,
            never=self._never,
            batch_size=self._batch_size,
        )
        return schedule.outcomes()

    def answer(self, question: Question, settings: GenerationSettings) -> Generated:
        """Answers a prepared question, the turn of a dialogue perhaps; see `Engine`."""
        ask = self._asks(question, settings)[0]
        return self._go_on(ask) if self._is_free(ask) else self._fixed.answers([ask])[0]

    def _asks(self, question: Question, settings: GenerationSettings) -> list[Ask]:
        """The answers wanted to a question, one a sample.

        Raises:
            ChatBindError: its `problem`; or nobody waits for it.
        """
        if (error := question.problem or question.given_up) is not None:
            raise error
        prompt = question.prompt
        assert prompt is not None, "the question was not prepared"
        settings = question.settings or settings
        room = room_for_answer(settings, len(prompt.input_ids), self.longest_context)
        first = Ask(question, prompt, settings, self._decoder(settings.stop), room)
        return [replace(first, sample=n) for n in range(settings.samples)]

    @cached_property
    def _rows_work(self) -> bool:
        obstacle = row_obstacle(self._model)
        if obstacle:
            note(f"answers are made in fixed batches: {obstacle}")
        return obstacle is None

    def _by_rows(self, ask: Ask) -> bool:
        """Whether an answer can be made beside others that come and go."""
        return self._is_free(ask) and self._rows_work

    def _is_free(self, ask: Ask) -> bool:
        """Whether nothing about the answer itself needs `generate`, or scores."""
        longest = self._longest_together
        if longest is not None and len(ask.prompt.input_ids) + ask.room > longest:
            return False
        return ask.settings.num_beams == 1 and not ask.question.choices

    def _others(self, asks: Sequence[Ask]) -> Iterator[tuple[Ask, Outcome]]:
        """The answers that cannot."""
        for ask in asks:
            if ask.question.choices:
                yield from self._attempt([ask], self._scored)
        free = [ask for ask in asks if not ask.question.choices]
        alone = self._longest_together is not None
        for group in self._fixed.groups(free, self._batch_size, alone=alone):
            yield from self._attempt(group, self._fixed.answers)

    def _scored(self, group: Sequence[Ask]) -> list[Generated]:
        return [likeliest(self._model, ask.question) for ask in group]

    def _attempt(
        self, group: Sequence[Ask], work: Callable[[Sequence[Ask]], list[Generated]]
    ) -> Iterator[tuple[Ask, Outcome]]:
        """The answers of a group, halved as long as it fails.

        Raises:
            Exception: the GPU is out of order.
        """
        for ask in group:
            if error := ask.question.given_up:
                yield ask, error
        group = [ask for ask in group if ask.question.given_up is None]
        if not group:
            return
        try:
            answers = work(group)
        except Exception as error:
            if isinstance(error, GPU_FAILED) and not out_of_memory(error):
                raise
            if len(group) == 1:
                yield group[0], failure(error, group[0])
                return
            error.__traceback__ = None
        else:
            for ask, answer in zip(group, answers, strict=True):
                yield ask, ask.question.given_up or answer
            return
        half = len(group) // 2
        yield from self._attempt(group[:half], work)
        yield from self._attempt(group[half:], work)

    def _go_on(self, ask: Ask) -> Generated:
        """Answers a turn of a dialogue, whose keys and values are kept for the next one.

        Raises:
            Exception: whatever the model raises; RecordError: its numbers were not finite.
        """
        dialogue = Dialogue(self._model)
        with suppress(IndexError):  # nobody else goes on with it meanwhile
            dialogue = self._dialogues.pop()
        try:
            logits = dialogue.read(ask.prompt)
        except Exception as error:
            # whether it is the model's kind is tried out only now: a first answer does not wait
            if out_of_memory(error) or self._rows_work:
                raise
            return self._fixed.answers([ask])[0]
        while True:
            [following] = choose(logits, [ask], self._never)
            if following.token is None:
                raise RecordError(NOT_FINITE, where=ask.where)
            ask.take(following)
            ask.tell()
            if ask.ended or ask.question.given_up:
                break
            logits = dialogue.go_on(following.token)
        self._dialogues[:] = [dialogue]
        return ask.generated()

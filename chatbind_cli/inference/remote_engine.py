"""The engine elsewhere: vLLM answers over HTTP, many questions at a time."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Coroutine, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from chatbind_cli.data.tokens import PromptEncoder
from chatbind_cli.errors import ChatBindError, RecordError
from chatbind_cli.inbox import Inbox
from chatbind_cli.inference.completion import Answered, request_of
from chatbind_cli.inference.decoding import AnswerDecoder, Generated, GrowingText, Outcome
from chatbind_cli.inference.engine import check_length, context_length, room_for_answer
from chatbind_cli.inference.front import prompt_embeddings
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.loaded_model import LoadedModel
from chatbind_cli.inference.questions import Listener, Question
from chatbind_cli.inference.replicas import KEY_VARIABLE, NoEngineLeftError, Replica, Replicas
from chatbind_cli.inference.together import answered_together
from chatbind_cli.jsonl import Record
from chatbind_cli.loop_thread import cancel_others, loop_in_a_thread
from chatbind_cli.model.config import end_ids
from chatbind_cli.model.probe import PROBE_TOKENS, probe_embeddings, read_probe

_GLANCE_S = 0.1  # how often it is looked whether an answer is still wanted


class RemoteEngine:
    """One or more engines that serve the language model of a ChatBind folder.

    A context manager.

    Args:
        front: the rest of the model, see `load_front`.
        urls: where they are, each ending in `/v1`.
        style: prompt style in place of the model's own.
        in_flight: questions at a time, over all of them.

    Attributes:
        longest_context: the model's, or the engines' where that is shorter.

    Raises:
        CheckpointError: nothing is known by which an engine could show that it has the model.
        EngineError: none of them is there, or one serves another model.
        UsageError: an address is none.
    """

    def __init__(
        self,
        front: LoadedModel,
        urls: Sequence[str],
        *,
        style: str | None = None,
        in_flight: int = 1,
    ) -> None:
        self._front = front
        model: Any = front.bundle.model
        prompts = PromptEncoder(front.bundle.tokenizer, front.bundle.config, style)
        own = model.generation_config
        self._end_ids = sorted({*prompts.stop_token_ids, *end_ids(own.eos_token_id)})
        self._never = own.suppress_tokens or []
        self._stops = prompts.stop_strings
        self._in_flight = in_flight
        expected = read_probe(front.path)
        with torch.inference_mode():
            embeddings = probe_embeddings(model, front.bundle.tokenizer)
        # as `answer_probe` makes it: nothing but the number of tokens ends it
        probe = request_of(
            embeddings,
            GenerationSettings(logprobs=True),
            room=PROBE_TOKENS,
            end_ids=(),
            never=self._never,
            stops=(),
            salt="",
        ) | {"ignore_eos": True}
        key = os.environ.get(KEY_VARIABLE, "").strip()
        with ExitStack() as stack:
            self._submit = stack.enter_context(loop_in_a_thread("engine"))
            self._replicas = Replicas(urls, key=key, probe=probe, expected=expected)
            stack.callback(self._let_go)
            self._submit(self._replicas.connect()).result()
            self._open = stack.pop_all()
        known = (context_length(model.config), self._replicas.longest_context)
        self.longest_context = min((n for n in known if n is not None), default=None)

    def __enter__(self) -> RemoteEngine:
        """Nothing more to do."""
        return self

    def __exit__(self, *error: object) -> None:
        """Lets go of connections and the thread; what is under way is dropped."""
        self._open.close()

    def _let_go(self) -> None:
        self._submit(cancel_others()).result()
        self._submit(self._replicas.close()).result()

    def identity(self) -> dict[str, Any]:
        """What the metadata of answers say of it."""
        return {"engine": "remote"}

    def run(
        self, questions: Inbox[Question], settings: GenerationSettings
    ) -> Iterator[tuple[Question, Outcome]]:
        """Answers prepared questions as they come back; see `Engine.run`."""

        def start(question: Question) -> Coroutine[Any, Any, Outcome]:
            return self._outcome(question, *self._request(question, settings))

        return answered_together(
            questions, start, self._submit, at_a_time=self._in_flight, fatal=NoEngineLeftError
        )

    async def _outcome(self, question: Question, body: Record, decoder: AnswerDecoder) -> Outcome:
        """The answer, of which whoever listens hears, unless nobody waits for it any more.

        Of several samples they hear at the end alone.
        """
        listener = question.listener
        asking: Coroutine[Any, Any, list[Answered]]
        if listener is None or body["n"] > 1:
            asking = self._replicas.ask(lambda replica: replica.answers(body))
        else:
            asking = self._growing(body, decoder, listener)
        task = asyncio.ensure_future(asking)
        try:
            while not task.done():
                if (given_up := question.given_up) is not None:
                    return given_up
                await asyncio.wait({task}, timeout=None if listener is None else _GLANCE_S)
            return _generated(task.result(), decoder)
        finally:
            # it closes the connection, by which the engine learns that nobody waits
            task.cancel()

    async def _growing(
        self, body: Record, decoder: AnswerDecoder, listener: Listener
    ) -> list[Answered]:
        """The one answer to a request, which is heard while it grows."""

        def begin(replica: Replica) -> Awaitable[Answered]:
            # should it break off, the same tokens come again from another
            text = GrowingText(decoder)
            return replica.growing(body, lambda ids: listener.grown(0, text.safe(ids)))

        return [await self._replicas.ask(begin)]

    def answer(self, question: Question, settings: GenerationSettings) -> Generated:
        """Answers one prepared question; see `Engine.answer`."""
        asking = self._outcome(question, *self._request(question, settings))
        outcome: Outcome = self._submit(asking).result()
        if isinstance(outcome, ChatBindError):
            raise outcome
        return outcome

    def _request(
        self, question: Question, settings: GenerationSettings
    ) -> tuple[Record, AnswerDecoder]:
        """What is sent for a question, and what reads the answer.

        Raises:
            ChatBindError: its `problem`; it cannot be asked, or nobody waits for it.
        """
        if (error := question.problem or question.given_up) is not None:
            raise error
        assert question.prompt is not None, "the question was not prepared"
        settings = question.settings or settings
        if question.choice_ids:
            raise RecordError("an engine does not tell how likely a choice is")
        length = len(question.prompt.input_ids)
        check_length(length, self.longest_context)
        decoder = AnswerDecoder(
            self._front.bundle.tokenizer, self._end_ids, (*self._stops, *settings.stop)
        )
        body = request_of(
            prompt_embeddings(self._front, question.prompt),
            settings,
            room=room_for_answer(settings, length, self.longest_context),
            end_ids=self._end_ids,
            never=self._never,
            stops=decoder.stops,
            salt=repr(question.id),
        )
        return body, decoder


def _generated(answers: Sequence[Answered], decoder: AnswerDecoder) -> Generated:
    """The answer; of several the first, with all of them."""
    found = [decoder.finished(answer.ids, answer.logprobs or None) for answer in answers]
    return replace(found[0], samples=tuple(found)) if len(found) > 1 else found[0]

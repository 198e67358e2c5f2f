"""OpenAI's API in front of a desk: which address does what.

Questions come from strangers, several at a time; each has its request, its limits and its end.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.openai_chat import check_model, read_chat_request
from chatbind_cli.inference.openai_reply import Head, chunk, completion, final_chunk, usage_chunk
from chatbind_cli.json_text import Record
from chatbind_cli.serving.desk import Desk
from chatbind_cli.serving.embeddings import Embeddings
from chatbind_cli.serving.incoming import Bodies, attended
from chatbind_cli.serving.limits import Limits
from chatbind_cli.serving.metrics import Metrics
from chatbind_cli.serving.replies import EventStream, json_reply
from chatbind_cli.serving.ticket import Ticket


class Api:
    """The addresses below `/v1`, and those that tell how the server is.

    Args:
        desk: where questions wait.
        settings: how answers are generated where a request says nothing of it.
        model_id: what the model is called.
        bodies: reads what is sent.
        limits: what a request may take.
        metrics: what counts it.
    """

    def __init__(
        self,
        desk: Desk,
        settings: GenerationSettings,
        *,
        model_id: str,
        bodies: Bodies,
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        self._desk = desk
        self._settings = settings
        self._model_id = model_id
        self._limits = limits
        self._metrics = metrics
        self._bodies = bodies
        self._begun = int(time.time())
        self._embeddings = Embeddings(desk, model_id, limits)

    def routes(self) -> list[BaseRoute]:
        """The addresses."""
        return [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/embeddings", self._embed, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/health", self._health),
            Route("/metrics", self._numbers),
        ]

    async def _chat(self, request: Request) -> Response | EventStream:
        async with AsyncExitStack() as stack:
            content = await stack.enter_async_context(self._bodies.content(request))
            name = f"chatcmpl-{secrets.token_hex(12)}"
            asked = read_chat_request(
                await self._bodies.record(content),
                settings=self._settings,
                model_id=self._model_id,
                request_id=name,
            )
            del content
            begun = asyncio.get_running_loop().time()
            deadline = begun + self._limits.request_s
            ticket = self._desk.ask(asked.question)
            stack.callback(ticket.leave)
            if not asked.stream:
                generated = await attended(request, ticket.answer(), deadline)
                self._count(request, generated)
                return json_reply(completion(self._head(name), generated))
            events = self._events(request, ticket, name, usage=asked.include_usage)
            stack.push_async_callback(events.aclose)
            # what goes wrong before the first word still has a status of its own
            first = await attended(request, anext(events), deadline)
            waited = asyncio.get_running_loop().time() - begun
            self._metrics.first_token_seconds.observe(waited)
            return EventStream(request, first, events, deadline, stack.pop_all())

    async def _events(
        self, request: Request, ticket: Ticket, name: str, *, usage: bool
    ) -> AsyncGenerator[Record, None]:
        head = self._head(name)
        begun = set()
        async for sample, text in ticket.pieces():
            yield chunk(head, sample, text, first=sample not in begun)
            begun.add(sample)
        generated = await ticket.answer()
        self._count(request, generated)
        for sample in range(len(generated.each)):
            if sample not in begun:
                yield chunk(head, sample, "", first=True)
            yield final_chunk(head, sample, generated)
        if usage:
            yield usage_chunk(head, generated)

    def _head(self, name: str) -> Head:
        return Head(name, self._model_id, int(time.time()))

    def _count(self, request: Request, generated: Generated) -> None:
        made = sum(one.n_tokens for one in generated.each)
        self._metrics.prompt_tokens.inc(generated.n_prompt)
        self._metrics.generated_tokens.inc(made)
        request.state.tokens = generated.n_prompt, made

    async def _embed(self, request: Request) -> Response:
        async with self._bodies.content(request) as content:
            media, form = self._embeddings.read(await self._bodies.record(content))
            del content
            deadline = asyncio.get_running_loop().time() + self._limits.request_s
            reply = await attended(request, self._embeddings.reply(media, form), deadline)
            self._metrics.embeddings.inc(len(reply["data"]))
            return json_reply(reply)

    async def _models(self, request: Request) -> Response:
        return json_reply({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        check_model(request.path_params["name"], self._model_id)
        return json_reply(self._described())

    def _described(self) -> Record:
        return {
            "id": self._model_id,
            "object": "model",
            "created": self._begun,
            "owned_by": "chatbind",
        }

    async def _health(self, request: Request) -> Response:
        desk = self._desk
        told = {"status": desk.state, "waiting": desk.waiting, "under_way": desk.under_way}
        return json_reply(told, 200 if desk.state == "ready" else 503)

    async def _numbers(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=self._metrics.content_type)

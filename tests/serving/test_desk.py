"""The desk: strangers' questions to one engine, who leave, read slowly, or lose their engine."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.questions import Question
from chatbind_cli.media.medium import Medium
from chatbind_cli.serving.desk import BusyError, Desk, Ticket
from tests.inference.world import World, make_world

SHORT = GenerationSettings(max_new_tokens=12)
LONG = GenerationSettings(max_new_tokens=400)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def answerer(small: World) -> Answerer:
    return Answerer.from_pretrained(small.model, device="cpu")


def desk_of(answerer: Answerer, most_waiting: int = 300) -> Desk:
    @contextmanager
    def open_answerer() -> Iterator[Answerer]:
        yield answerer

    return Desk(open_answerer, SHORT, most_waiting=most_waiting)


async def ready(desk: Desk, state: str = "ready") -> Desk:
    for _ in range(1000):
        if desk.state == state:
            return desk
        await asyncio.sleep(0.01)
    raise AssertionError(desk.state, desk.failure)


def asked(count: int, world: World) -> list[Question]:
    """Of many lengths, a third of them about a picture."""
    return [
        Question(
            f"What about the {'brown ' * (n % 5)}dog {n}?",
            (Medium(None, world.media / f"{n % 6}.png"),) * (n % 3 == 0),
            id=n,
            settings=replace(SHORT, max_new_tokens=3 + n % 15),
        )
        for n in range(count)
    ]


def alone(answerer: Answerer, questions: list[Question]) -> dict[Any, str]:
    prepared = answerer.prepare(questions)
    return {q.id: answerer.generate([q], SHORT)[0].text for q in prepared}


def test_many_ask_at_once_and_half_of_them_leave(small: World, answerer: Answerer) -> None:
    questions = asked(200, small)
    wanted = alone(answerer, questions)
    draw = random.Random(1)

    async def stay(ticket: Ticket, question: Question) -> None:
        pieces = [piece async for piece in ticket.pieces()]
        answered = await ticket.answer()
        assert answered.question.id == question.id
        assert "".join(piece.text for piece in pieces) == answered.generated.text
        assert answered.generated.text == wanted[question.id]

    async def leave(ticket: Ticket) -> None:
        with pytest.raises(asyncio.TimeoutError):
            async with asyncio.timeout(draw.random()):
                async for _ in ticket.pieces():
                    pass
                await asyncio.sleep(9)
        ticket.leave()
        ticket.leave()

    async def main() -> None:
        desk = await ready(desk_of(answerer))
        tickets = [desk.ask(question) for question in questions]
        async with asyncio.TaskGroup() as group:
            for number, (ticket, question) in enumerate(zip(tickets, questions, strict=True)):
                group.create_task(leave(ticket) if number % 2 else stay(ticket, question))
        for _ in range(500):
            if not desk.waiting + desk.under_way:
                break
            await asyncio.sleep(0.01)
        assert (desk.waiting, desk.under_way) == (0, 0)
        await desk.drain(5)

    asyncio.run(main())


def test_as_many_wait_as_may(answerer: Answerer) -> None:
    async def main() -> None:
        desk = await ready(desk_of(answerer, most_waiting=20))
        tickets = []
        with pytest.raises(BusyError, match="20 questions wait already") as told:
            while True:
                tickets.append(desk.ask(Question("What?", id=len(tickets), settings=LONG)))
        assert 1 <= told.value.retry_after_s <= 60
        # whoever leaves before the engine has begun makes room at once
        tickets[-1].leave()
        await asyncio.sleep(0)
        tickets.append(desk.ask(Question("What?", id="more")))
        for ticket in tickets:
            ticket.leave()
        await desk.drain(5)

    asyncio.run(main())

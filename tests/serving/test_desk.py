"""The desk: strangers' questions to one engine, who leave, read slowly, or lose their engine."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai._base_client
import pytest
import torch

from chatbind_cli.errors import ChatBindError, EngineError
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.front import load_front
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.questions import Question
from chatbind_cli.inference.remote_engine import RemoteEngine
from chatbind_cli.media.medium import Medium
from chatbind_cli.model.whole import language_model
from chatbind_cli.serving.desk import BusyError, Desk
from chatbind_cli.serving.ticket import Ticket
from tests.inference.engine_server import EngineServer, Served
from tests.inference.world import World

SHORT = GenerationSettings(max_new_tokens=12)
LONG = GenerationSettings(max_new_tokens=400)


@pytest.fixture(scope="module")
def answerer(world: World) -> Answerer:
    return Answerer.from_pretrained(world.model, device="cpu")


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
    answers = answerer.generate(prepared, SHORT)
    return {q.id: answer.text for q, answer in zip(prepared, answers, strict=True)}


def test_many_ask_at_once_and_half_of_them_leave(world: World, answerer: Answerer) -> None:
    questions = asked(200, world)
    wanted = alone(answerer, questions)
    draw = random.Random(1)

    async def stay(ticket: Ticket, question: Question) -> None:
        pieces = [piece async for piece in ticket.pieces()]
        answered = await ticket.answer()
        assert "".join(text for _, text in pieces) == answered.text
        assert answered.text == wanted[question.id]

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


def test_a_slow_reader_gets_the_newest_text_and_holds_nobody_up(answerer: Answerer) -> None:
    async def main() -> None:
        desk = await ready(desk_of(answerer))
        slow = desk.ask(Question("Describe a bird.", id=1, settings=LONG))
        pieces = slow.pieces()
        first = await anext(pieces)
        quick = [desk.ask(Question("What?", id=n)) for n in range(2, 40)]
        for ticket in quick:
            await ticket.answer()
        whole = await slow.answer()
        rest = [piece async for piece in pieces]
        assert whole.n_tokens == 400
        assert len(rest) <= 2
        assert first[1] + "".join(text for _, text in rest) == whole.text
        await desk.drain(5)

    asyncio.run(main())


def test_several_answers_grow_side_by_side(answerer: Answerer) -> None:
    settings = replace(SHORT, temperature=1.0, samples=3)

    async def main() -> None:
        desk = await ready(desk_of(answerer))
        ticket = desk.ask(Question("Describe a bird.", id=1, settings=settings))
        grown = ["", "", ""]
        async for sample, text in ticket.pieces():
            grown[sample] += text
        answered = await ticket.answer()
        assert grown == [one.text for one in answered.samples]
        await desk.drain(5)

    asyncio.run(main())


def test_a_question_that_cannot_be_asked_fails_alone(world: World, answerer: Answerer) -> None:
    async def main() -> None:
        desk = await ready(desk_of(answerer))
        broken = desk.ask(Question("?", (Medium(None, world.media / "none.png"),), id=1))
        long = desk.ask(Question("dog " * 600, id=2))
        fine = desk.ask(Question("What?", id=3))
        for ticket, words in ((broken, "no such file"), (long, "512 at most")):
            with pytest.raises(ChatBindError, match=words):
                async for _ in ticket.pieces():
                    pass
        assert (await fine.answer()).text
        [found, none] = await desk.embed(
            [Medium(None, world.media / name) for name in ("1.png", "none.png")]
        )
        assert isinstance(found, Medium) and found.embedding is not None
        assert isinstance(none, ChatBindError)
        await desk.drain(5)

    asyncio.run(main())


def test_an_end_lets_answers_finish_but_not_for_ever(answerer: Answerer) -> None:
    async def main(grace_s: float) -> tuple[int, int]:
        desk = await ready(desk_of(answerer))
        tickets = [desk.ask(Question("What?", id=n, settings=LONG)) for n in range(9)]
        await asyncio.sleep(0.2)
        draining = asyncio.create_task(desk.drain(grace_s))
        await asyncio.sleep(0)
        assert desk.state == "draining"
        with pytest.raises(EngineError, match="about to end"):
            desk.ask(Question("Who?"))
        outcomes = await asyncio.gather(*(t.answer() for t in tickets), return_exceptions=True)
        await draining
        assert not desk._thread.is_alive()
        for failed in (one for one in outcomes if not isinstance(one, Generated)):
            assert "before the answer is whole" in str(failed)
        return sum(isinstance(one, Generated) for one in outcomes), len(outcomes)

    assert asyncio.run(main(60)) == (9, 9)
    assert asyncio.run(main(0.1)) == (0, 9)


def test_what_breaks_here_ends_the_desk_and_nobody_waits_on(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    async def main() -> None:
        desk = await ready(desk_of(answerer))
        tickets = [desk.ask(Question("What?", id=n, settings=LONG)) for n in range(20)]
        await anext(tickets[0].pieces())
        monkeypatch.setattr("chatbind_cli.inference.schedule.choose", broken)
        for ticket in tickets:
            with pytest.raises(EngineError, match="device-side assert"):
                await ticket.answer()
        assert desk.state == "failed"
        assert "device-side" in str(desk.failure)
        with pytest.raises(EngineError, match="any more"):
            desk.ask(Question("Who?"))
        await desk.drain(5)
        assert desk.state == "failed"

    asyncio.run(main())


def test_a_model_that_cannot_be_opened_fails_at_once(world: World) -> None:
    async def main() -> None:
        lost = Answerer.from_pretrained(world.model, encoder="nowhere", device="cpu")
        desk = await ready(desk_of(lost), "failed")
        assert "nowhere: no such encoder" in str(desk.failure)

        @contextmanager
        def open_answerer() -> Iterator[Answerer]:
            raise EngineError("no connection")
            yield lost

        desk = await ready(Desk(open_answerer, SHORT, most_waiting=9), "failed")
        assert "no connection" in str(desk.failure)

    asyncio.run(main())


def test_an_engine_elsewhere_that_dies_is_found_again(
    world: World, answerer: Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatbind_cli.serving.desk._RETRY_S", 0.2)
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.02)
    front = load_front(world.model, encoders=[world.encoder], dtype="float32")
    language_model(world.model, tmp_path / "lm")
    served = Served(tmp_path / "lm")
    servers = [EngineServer(served)]
    wanted = alone(answerer, [Question("What?", id=1)])[1]

    @contextmanager
    def open_answerer() -> Iterator[Answerer]:
        with RemoteEngine(front, [servers[-1].url], in_flight=4) as engine:
            yield Answerer(front, engine=engine)

    async def main() -> None:
        desk = await ready(Desk(open_answerer, SHORT, most_waiting=50))
        for _ in range(2):
            assert (await desk.ask(Question("What?", id=1)).answer()).text == wanted
            servers[-1].step_seconds = 0.02
            tickets = [desk.ask(Question("What?", id=n, settings=LONG)) for n in range(20)]
            await anext(tickets[0].pieces())
            servers[-1].close()
            for ticket in tickets:
                with pytest.raises(EngineError, match="no engine|no connection|failed"):
                    await ticket.answer()
            await ready(desk, "engine gone")
            await asyncio.sleep(0.3)
            with pytest.raises(EngineError):
                desk.ask(Question("Who?"))
            await asyncio.sleep(0.3)
            assert desk.state == "engine gone"
            servers.append(EngineServer(served))
            await ready(desk)  # nobody has to ask for it: who looks at /health sends no questions
        await desk.drain(5)
        assert not desk._thread.is_alive()

    asyncio.run(main())
    servers[-1].close()

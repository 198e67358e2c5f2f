"""Who waits for an answer hears it grow; who does not wait any more costs nothing."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import pytest

from chatbind_cli.errors import ChatBindError
from chatbind_cli.inbox import Inbox
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.questions import Question
from chatbind_cli.media.medium import Medium
from tests.inference.small_engine import chatbind, engine, prompts_of, question, run, texts
from tests.inference.world import World, inbox_of

SHORT = GenerationSettings(max_new_tokens=12)


class Ears:
    """Listens, and leaves after hearing so many pieces, or when it is told so."""

    def __init__(self, patience: int = 1000, then: Callable[[], None] = lambda: None) -> None:
        self.heard: dict[int, list[str]] = {}
        self.gone = patience == 0
        self._patience = patience
        self._then = then

    def grown(self, sample: int, text: str) -> None:
        self.heard.setdefault(sample, []).append(text)
        self._patience -= 1
        if self._patience == 0:
            self.gone = True
            self._then()


def with_ears(asked: Question, *args: Any) -> tuple[Question, Ears]:
    ears = Ears(*args)
    return replace(asked, listener=ears), ears


def given_up(outcome: object) -> bool:
    return isinstance(outcome, ChatBindError) and "given up" in str(outcome)


@pytest.mark.parametrize("kind", ["llama", "lfm2"])
def test_a_listener_hears_the_answer_grow_and_changes_nothing(kind: str) -> None:
    one = engine(chatbind(kind))
    asked = [question(n, samples=1 + n % 2, temperature=n % 2) for n in range(12)]
    pairs = [with_ears(item) for item in asked]
    heard = run(one, [item for item, _ in pairs])
    assert heard == run(one, asked)
    for item, ears in pairs:
        answer = heard[item.id]  # type: ignore[index]
        assert isinstance(answer, Generated)
        answers = answer.samples or (answer,)
        assert sorted(ears.heard) == [*range(len(answers))]
        for number, whole in enumerate(answers):
            pieces = ears.heard[number]
            assert all(after.startswith(before) for before, after in pairwise(pieces))
            assert pieces[-1] == whole.text
            assert len(pieces) >= whole.n_tokens


@pytest.mark.parametrize(("kind", "beams"), [("llama", 1), ("lfm2", 1), ("llama", 2)])
def test_an_answer_can_be_given_up_at_every_moment(
    kind: str, beams: int, reads: list[tuple[int, int]]
) -> None:
    one = engine(chatbind(kind))
    asked = [question(n, num_beams=beams, max_new_tokens=9) for n in range(6)]
    wanted = texts(run(one, asked))
    for moment in range(1 if beams > 1 else 9):
        left, ears = with_ears(asked[2], moment)
        found = run(one, [*asked[:2], left, *asked[3:]])
        assert given_up(found.pop(2)) == ears.gone, moment
        assert texts(found) == {n: text for n, text in wanted.items() if n != 2}
        if beams == 1:
            # alone, it takes no step more than was heard
            reads.clear()
            run(one, [with_ears(asked[2], moment)[0]])
            steps = sum(tokens == 1 for _, tokens in reads)
            assert steps == max(0, moment - 1)


def test_a_beam_search_is_left_at_the_next_token(reads: list[tuple[int, int]]) -> None:
    class Impatient(Ears):
        gone = property(lambda _: len(reads) >= 5, lambda *_: None)  # type: ignore[assignment]

    asked = question(2, num_beams=2, max_new_tokens=200)
    assert given_up(run(engine(chatbind()), [replace(asked, listener=Impatient())])[2])
    assert len(reads) == 5


def test_one_that_waits_is_dropped_before_its_prompt_is_read(reads: list[tuple[int, int]]) -> None:
    one = engine(chatbind(), batch_size=1)
    run(one, [question(5)])
    reads.clear()
    waiting, ears = with_ears(question(1))
    # which leaves with the last token of the one before it
    first, _ = with_ears(question(2, max_new_tokens=3), 3, lambda: setattr(ears, "gone", True))
    assert given_up(run(one, [first, waiting])[1])
    assert first.prompt is not None
    assert sum(tokens for _, tokens in prompts_of(reads)) == len(first.prompt.input_ids)


def test_several_samples_go_together(reads: list[tuple[int, int]]) -> None:
    one = engine(chatbind(), batch_size=3)
    left, _ = with_ears(question(0, samples=5, temperature=1.0, max_new_tokens=50), 7)
    asked = [left, *(question(n) for n in range(1, 6))]
    found = run(one, asked)
    assert given_up(found.pop(0))
    assert texts(found) == texts(run(one, asked[1:]))
    assert max(rows for rows, _ in reads) <= 3


def test_under_a_steady_stream_nobody_waits_for_ever() -> None:
    """However long its prompt or answer, a question is overtaken by three windows at most."""
    size = 8
    one = engine(chatbind(), batch_size=size)
    inbox: Inbox[Question] = Inbox(1000)
    asked = iter(range(10_000))
    # short ones among long ones, and long ones among short ones
    lengths = {n: 40 if n % 9 == 4 else 1 + n % 3 for n in range(400)}

    def ask() -> None:
        n = next(asked)
        item = question(n, max_new_tokens=lengths.get(n, 1))
        assert item.prompt is not None
        prompt = replace(item.prompt, input_ids=item.prompt.input_ids * (1 + (n % 7 == 3) * 2))
        inbox.put(replace(item, prompt=prompt) if not prompt.media else item)

    for _ in range(60):
        ask()
    done: list[int] = []
    for item, _outcome in one.run(inbox, GenerationSettings()):
        done.append(item.id)  # type: ignore[arg-type]
        if len(done) < 300:
            ask()  # there are always sixty that wait
        elif len(done) == 300:
            inbox.close()
    overtaken = Counter[int]()
    for place, number in enumerate(done):
        overtaken[number] = sum(later > number for later in done[:place])
    # those of a window go by length, and while a long answer is made others come and go
    assert max(overtaken.values()) <= 3 * 4 * size, overtaken.most_common(3)


@pytest.fixture(scope="module")
def answerer(world: World) -> Answerer:
    return Answerer.from_pretrained(world.model, device="cpu")


def test_media_of_one_that_has_left_are_not_embedded(
    world: World, answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for half in ("read", "encode"):
        monkeypatch.setattr(answerer.media_encoder, half, lambda media, _=0: [1 // (not media)][:0])
    left, _ = with_ears(Question("What?", (Medium(None, world.media / "1.png"),), id=1), 0)
    asked = inbox_of([left, Question("What?", id=2)])
    found = {item.id: outcome for item, outcome in answerer.run(asked, SHORT)}
    assert given_up(found[1])
    assert isinstance(found[2], Generated)


@pytest.fixture
def slow_media(world: World) -> Iterator[tuple[str, threading.Event]]:
    """The address of a picture that does not come before it is told to."""
    go = threading.Event()
    picture = (world.media / "2.png").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            go.wait(20)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(picture)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/2.png", go
    go.set()
    server.shutdown()
    server.server_close()


def test_a_slow_medium_holds_up_its_own_question_alone(
    world: World, slow_media: tuple[str, threading.Event]
) -> None:
    address, go = slow_media
    answerer = Answerer.from_pretrained(world.model, device="cpu")
    answerer._readers = 4
    slow = [Question("What?", (Medium(None, address),), id=n) for n in range(3)]
    quick = [
        Question("What?", (Medium(None, world.media / "2.png"),) * (n % 2), id=n)
        for n in range(3, 30)
    ]
    order, answers = [], set()
    for item, outcome in answerer.run(inbox_of([*slow, *quick]), SHORT):
        order.append(item.id)
        assert isinstance(outcome, Generated)
        if item.media:
            answers.add(outcome.text)
        if len(order) == len(quick):
            go.set()
    assert set(order[: len(quick)]) == {item.id for item in quick}
    assert set(order[len(quick) :]) == {0, 1, 2}
    assert len(answers) == 1

"""Answers of an engine over HTTP: a server of ours that runs the tiny world's language model."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace

import pytest
import torch

from chatbind_cli.errors import ChatBindError, CheckpointError, EngineError, RecordError, UsageError
from chatbind_cli.inbox import Inbox
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.front import load_front
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.loaded_model import load_model
from chatbind_cli.inference.questions import Question
from chatbind_cli.inference.remote_engine import RemoteEngine
from chatbind_cli.inference.stream import Stream
from chatbind_cli.media.medium import Medium
from tests.inference.engine_server import Served
from tests.inference.world import inbox_of, questions

SHORT = GenerationSettings(max_new_tokens=12)
COUNT = 12


@pytest.fixture(scope="module")
def local(world):
    return Answerer(load_model(world.model, encoders=[world.encoder], dtype="float32"))


@pytest.fixture(scope="module")
def asked(local, world):
    """Questions that are ready to be asked."""
    made = [
        Question(
            record["text"],
            tuple(
                Medium(kind, world.media / record[kind])
                for kind in ("image", "audio")
                if kind in record
            ),
            id=record["question_id"],
        )
        for record in questions(COUNT)
    ]
    return local.prepare(made)


@pytest.fixture(scope="module")
def expected(local, asked):
    return {q.id: local.generate([q], SHORT)[0] for q in asked}


def front(world):
    return load_front(world.model, encoders=[world.encoder], dtype="float32")


def connect(world, *servers, **options):
    return RemoteEngine(front(world), [server.url for server in servers], **options)


def run(engine, asked, settings=SHORT):
    return {question.id: outcome for question, outcome in engine.run(inbox_of(asked), settings)}


def test_answers_are_those_of_the_model_here(world, start, asked, expected):
    server = start()
    with connect(world, server, in_flight=5) as engine:
        assert engine.longest_context == 512
        assert run(engine, asked) == expected
    assert 1 < server.most_at_a_time <= 5
    assert {tuple(r["stop_token_ids"]) for r in server.requests[1:]} == {(2,)}
    ids = load_front(world.model).bundle.config.medium_ids()
    assert {tuple(map(int, r["logit_bias"])) for r in server.requests} == {(ids[1], ids[0], ids[2])}


def test_a_stop_text_of_the_users_ends_answers_there_as_here(world, start, local, asked):
    settings = GenerationSettings(max_new_tokens=30, stop=("s", "an"))
    server = start()
    with connect(world, server) as engine:
        there = run(engine, asked, settings)
    assert all(request["stop"] == ["s", "an"] for request in server.requests[1:])
    assert there == {q.id: local.generate([q], settings)[0] for q in asked}
    assert any(answer.finish_reason == "stop" for answer in there.values())


def test_a_stream_is_the_answer_piece_by_piece(world, start, asked, expected):
    with connect(world, start()) as engine:
        stream = Stream(engine, asked[0], SHORT)
        pieces = list(stream)
    assert len(pieces) > 2
    assert "".join(pieces) == stream.result.text
    assert stream.result == expected[0]


PASSING = [
    500,
    503,
    "reset",
    "cut",
    "garbage",
    (429, {"Retry-After": "0.2"}, "{}"),
    lambda reply: reply["choices"][0].pop("token_ids"),
    lambda reply: reply["choices"][0].update(token_ids=[1.5]),
    lambda reply: reply["choices"][0].update(token_ids=[-1]),
    lambda reply: reply["choices"][0].update(token_ids=[1 << 70]),
    lambda reply: reply["choices"][0].update(token_ids=[5] * 13),
    lambda reply: reply.update(choices=[]),
    lambda reply: reply.update(choices={"0": 1}),
]


def test_what_can_pass_is_tried_again(world, start, asked, expected):
    server = start()
    with connect(world, server) as engine:
        for number, fault in enumerate(PASSING):
            server.faults.append(fault)
            assert run(engine, asked[:2]) == {0: expected[0], 1: expected[1]}, number
            assert not server.faults, number


def test_a_server_is_left_as_long_as_it_asks(world, start, asked):
    server = start()
    with connect(world, server) as engine:
        server.faults.append((429, {"Retry-After": "1"}, "{}"))
        begun = time.monotonic()
        run(engine, asked[:1])
    assert time.monotonic() - begun >= 1


def test_a_stream_that_breaks_off_is_begun_again_and_nothing_is_shown_twice(
    world, start, asked, expected
):
    server = start()
    with connect(world, server) as engine:
        server.faults.append("cut")
        stream = Stream(engine, asked[0], SHORT)
        assert "".join(stream) == expected[0].text
    assert len(server.requests) >= 3
    assert stream.result == expected[0]


def test_leaving_a_stream_ends_the_answer_there(world, start, asked):
    server = start()
    server.step_seconds = 0.0
    with connect(world, server) as engine:
        server.step_seconds = 0.05
        for _ in Stream(engine, asked[0], GenerationSettings(max_new_tokens=400)):
            break
        assert server.cancelled.wait(3)


def test_questions_of_a_replica_that_dies_go_to_the_others(world, start, asked, expected, capsys):
    steady, killed = start(), start()
    with connect(world, steady, killed, in_flight=6) as engine:
        killed.step_seconds = 0.01
        killed.faults.extend([None, None, "die"])
        assert run(engine, asked) == expected
    assert capsys.readouterr().err.count(f"{killed.url} is left out: ") == 1


def test_when_the_last_engine_dies_what_is_answered_has_come_out(world, start, asked, expected):
    server = start()
    with connect(world, server, in_flight=2) as engine:
        server.faults.extend([None] * 4 + ["die"])
        inbox, got = Inbox(COUNT), {}
        for question in asked:
            inbox.put(question)
        with pytest.raises(EngineError, match="no engine is left; what is answered stays"):
            for question, outcome in engine.run(inbox, SHORT):
                got[question.id] = outcome
    assert 3 <= len(got) < COUNT
    assert got.items() <= expected.items()


def test_a_question_over_which_the_engine_fails_is_one_failed_question(
    world, start, asked, expected
):
    server = start()
    with connect(world, server) as engine:
        body, _ = engine._request(asked[4], SHORT)
        server.poison = body["prompt_embeds"]
        got = run(engine, asked)
    assert isinstance(got[4], EngineError)
    assert "failed 3 times" in str(got[4])
    assert {i: a for i, a in got.items() if i != 4} == {i: a for i, a in expected.items() if i != 4}


def test_what_the_engine_refuses_is_not_asked_twice(world, start, asked):
    server = start()
    with connect(world, server) as engine:
        server.faults.append((400, {}, json.dumps({"error": {"message": "too long"}})))
        [outcome] = run(engine, asked[:1]).values()
    assert isinstance(outcome, RecordError)
    assert "too long" in str(outcome)
    assert len(server.requests) == 2  # the probe, and this


def test_another_model_is_refused_in_one_line(world, start, served):
    other = Served(served)
    with torch.no_grad():
        other.model.model.layers[0].mlp.up_proj.weight.mul_(0.7)
    good, wrong = start(), start(model=other)
    with pytest.raises(EngineError, match="serves another model") as told:
        connect(world, good, wrong)
    assert wrong.url in str(told.value)


def test_a_replica_that_is_not_there_at_first_is_left_out(world, start, asked, expected, capsys):
    gone, here = start(), start()
    gone.close()
    with connect(world, gone, here) as engine:
        assert run(engine, asked[:3]) == {q.id: expected[q.id] for q in asked[:3]}
    assert f"{gone.url} is left out: no connection" in capsys.readouterr().err
    here.close()
    with pytest.raises(EngineError, match="no connection .* is the server up"):
        connect(world, gone, here)


def test_an_address_that_is_not_the_apis_is_told(world, start):
    server = start()
    with pytest.raises(EngineError, match="404.*does its address end in /v1"):
        RemoteEngine(front(world), [server.url.removesuffix("/v1")])


def test_the_key_goes_to_the_engine_and_into_no_message(world, start, asked, expected, monkeypatch):
    server = start(key="a-secret-of-some-length")
    monkeypatch.setenv("OPENAI_API_KEY", "what-is-meant-for-others")
    with pytest.raises(EngineError, match="is not welcome") as told:
        connect(world, server)
    assert "what-is-meant" not in str(told.value)
    monkeypatch.setenv("CHATBIND_ENGINE_KEY", "another-secret-of-mine")
    with pytest.raises(EngineError, match=r"Bearer \[key\] is not welcome"):
        connect(world, server)
    monkeypatch.setenv("CHATBIND_ENGINE_KEY", server.key)
    with connect(world, server) as engine:
        assert run(engine, asked[:1])[0] == expected[0]


def test_draws_depend_on_seed_and_question_alone(world, start, asked):
    settings = GenerationSettings(max_new_tokens=8, temperature=1.0, samples=3)
    server = start()
    with connect(world, server) as engine:
        many = run(engine, asked, settings)
        assert len({request["seed"] for request in server.requests[1:]}) == len(asked)
        few = run(engine, asked[5:6], settings)
        other = run(engine, asked[5:6], GenerationSettings(**{**vars(settings), "seed": 1}))
    assert many[5] == few[5] != other[5]
    texts = [answer.text for answer in few[5].samples]
    assert len(set(texts)) == 3
    assert few[5].text == texts[0]


def test_it_tells_how_likely_each_token_was(world, start, local, asked):
    settings = GenerationSettings(max_new_tokens=12, logprobs=True, stop=("s",))
    with connect(world, start()) as engine:
        there = run(engine, asked[:4], settings)
    for question in asked[:4]:
        here = local.generate([question], settings)[0]
        assert there[question.id].tokens == here.tokens
        assert there[question.id].logprobs == pytest.approx(here.logprobs, abs=1e-4)
        assert len(here.logprobs) == here.n_tokens


def test_what_an_engine_cannot_do_is_refused(world, start, asked):
    with connect(world, start()) as engine:
        for setting in (
            {"num_beams": 2},
            {"no_repeat_ngram_size": 2},
            {"repetition_penalty": 1.2},
            {"temperature": 2.1},
        ):
            [outcome] = run(engine, asked[:1], GenerationSettings(**setting)).values()
            assert isinstance(outcome, UsageError)
            assert next(iter(setting)) in str(outcome)


def test_numbers_that_are_none_are_not_sent(world, start, asked):
    question = asked[0]
    broken = replace(question.prompt.media[0], embedding=torch.full((8,), torch.nan))
    prompt = replace(question.prompt, media=(broken,))
    server = start()
    with connect(world, server) as engine:
        [outcome] = run(engine, [replace(question, prompt=prompt)]).values()
    assert "are not finite" in str(outcome)
    assert len(server.requests) == 1  # the probe


def test_a_context_that_the_engine_has_shorter_is_kept(world, start, local, asked):
    length = len(asked[0].prompt.input_ids)
    with connect(world, start(max_model_len=length + 3)) as engine:
        assert engine.longest_context == length + 3
        got = run(engine, [asked[0]], GenerationSettings(max_new_tokens=100))[0]
        assert (got.n_tokens, got.finish_reason) == (3, "length")
    with connect(world, start(max_model_len=length)) as engine:
        assert "the answer included" in str(run(engine, [asked[0]])[0])


def test_the_error_that_the_questions_end_with_comes_after_the_answers(
    world, start, asked, expected
):
    inbox, got = Inbox(3), {}
    inbox.put(asked[0])
    inbox.close(RecordError("the file is cut short"))
    with connect(world, start()) as engine, pytest.raises(RecordError, match="cut short"):
        for question, outcome in engine.run(inbox, SHORT):
            got[question.id] = outcome
    assert got == {0: expected[0]}


def test_leaving_the_answers_early_leaves_nothing_behind(world, start, asked):
    server = start()
    with connect(world, server) as engine:
        server.step_seconds = 0.01
        inbox = Inbox(COUNT)
        for question in asked:
            inbox.put(question)
        for _ in engine.run(inbox, SHORT):
            break
        assert inbox.put(asked[0]) is False
    assert not [t for t in threading.enumerate() if t.name == "engine"]


def test_without_a_note_of_the_probe_nobody_is_asked(world, start, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(world.model, folder)
    (folder / "engine.json").unlink()
    server = start()
    with pytest.raises(CheckpointError, match="has no engine.json"):
        RemoteEngine(load_front(folder), [server.url])
    assert server.requests == []
    shutil.copy(world.model / "engine.json", folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    with pytest.raises(ChatBindError, match="is of other weights"):
        RemoteEngine(load_front(folder), [server.url])


class Ears:
    """Listens, and leaves after so many pieces."""

    def __init__(self, patience=1000):
        self.heard = []
        self._patience = patience

    @property
    def gone(self):
        return len(self.heard) >= self._patience

    def grown(self, sample, text):
        assert sample == 0
        self.heard.append(text)


def test_a_listener_hears_the_answer_grow(world, start, asked, expected):
    server = start()
    ears = [Ears() for _ in asked]
    with connect(world, server, in_flight=4) as engine:
        server.faults.extend(["cut", None, 500, "reset", "garbage"])
        listened = [replace(q, listener=one) for q, one in zip(asked, ears, strict=True)]
        assert run(engine, listened) == expected
        # several samples come whole, since their pieces would come mixed
        drawn = GenerationSettings(max_new_tokens=8, temperature=1.0, samples=2)
        assert run(engine, listened[:2], drawn) == run(engine, asked[:2], drawn)
    for question, one in zip(asked, ears, strict=True):
        assert one.heard[-1] == expected[question.id].text
        assert len(set(one.heard)) > 2


@pytest.mark.parametrize("patience", [0, 1, 4])
def test_an_answer_that_nobody_waits_for_ends_there_too(world, start, asked, expected, patience):
    server, settings = start(), GenerationSettings(max_new_tokens=400)
    with connect(world, server, in_flight=3) as engine:
        server.step_seconds = 0.02
        inbox = Inbox(COUNT)
        inbox.put(replace(asked[3], listener=Ears(patience), settings=settings))
        for number, (question, outcome) in enumerate(engine.run(inbox, SHORT)):
            if number == 0:
                assert "given up" in str(outcome)
                assert not patience or server.cancelled.wait(3)
                inbox.put(asked[1])
                inbox.close()
            else:
                assert outcome == expected[question.id]
    assert len(server.requests) == 2 + (patience > 0)


def test_one_that_leaves_while_the_engine_has_not_begun_is_given_up_at_once(world, start, asked):
    server, ears = start(), Ears()
    with connect(world, server) as engine:
        server.faults.append(("slow", 3))
        threading.Timer(0.3, lambda: ears.heard.extend([""] * 1000)).start()
        begun = time.monotonic()
        [outcome] = run(engine, [replace(asked[0], listener=ears)]).values()
    assert "given up" in str(outcome)
    assert time.monotonic() - begun < 2

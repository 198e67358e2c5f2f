"""The chat API, asked by OpenAI's own client."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import openai
import pytest

from chatbind_cli.media.medium import Medium
from tests.serving.conftest import SETTINGS

QUESTION = "What about the brown dog?"


def data_uri(path):
    return "data:application/octet-stream;base64," + encoded(path)


def encoded(path):
    return base64.b64encode(path.read_bytes()).decode()


def ask(running, content=QUESTION, **more):
    messages = content if isinstance(content, list) and "role" in content[0] else None
    messages = messages or [{"role": "user", "content": content}]
    return running.client.chat.completions.create(model="model", messages=messages, **more)


def text(reply):
    return reply.choices[0].message.content


def parts_of(modality, path, way):
    """The part of a message that names a medium, in one of the ways there are."""
    if way == "openai" and modality == "audio":
        return {"type": "input_audio", "input_audio": {"data": encoded(path), "format": "wav"}}
    address = path.name if way == "path" else data_uri(path)
    if way == "openai":
        return {"type": f"{modality}_url", f"{modality}_url": {"url": address}}
    return {"type": "media", "modality": modality, "url": address}


WAYS = [
    *((modality, "path") for modality in ("image", "video", "audio", "depth", "thermal", "imu")),
    *((modality, "data") for modality in ("depth", "thermal", "imu")),
    *((modality, "openai") for modality in ("image", "video", "audio")),
]


@pytest.mark.parametrize(("modality", "way"), WAYS)
def test_every_sense_reaches_the_model(running, answerer, media, modality, way):
    path = media[modality]
    reply = ask(running, [{"type": "text", "text": QUESTION}, parts_of(modality, path, way)])
    expected = answerer.answer(QUESTION, [Medium(modality, path.name)], settings=SETTINGS)
    assert text(reply) == expected
    assert expected != answerer.answer(QUESTION, settings=SETTINGS)


def test_a_reply_is_openai_s(running, answerer):
    reply = ask(running)
    assert text(reply) == answerer.answer(QUESTION, settings=SETTINGS)
    assert (reply.object, reply.model, reply.choices[0].finish_reason) == (
        "chat.completion",
        "model",
        "length",
    )
    assert reply.usage.completion_tokens == SETTINGS.max_new_tokens
    assert reply.usage.prompt_tokens > 10
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert ask(running).id != reply.id


def test_several_media_and_turns(running, answerer):
    red, blue = ({"type": "image_url", "image_url": {"url": f"{n}.png"}} for n in (2, 4))
    first = [{"type": "text", "text": "Which dog?"}, red, blue]
    dialogue = [
        {"role": "system", "content": "Answer shortly."},
        {"role": "user", "content": first},
        {"role": "assistant", "content": "brown"},
        {"role": "user", "content": "And the car?"},
    ]
    both = text(ask(running, dialogue))
    other = [{**dialogue[1], "content": [first[0], blue, red]}]
    assert text(ask(running, [dialogue[0], *other, *dialogue[2:]])) != both
    assert text(ask(running, dialogue[1:])) != both


SETTING = [
    ({"max_tokens": 3}, {"max_new_tokens": 3}),
    ({"max_completion_tokens": 2}, {"max_new_tokens": 2}),
    ({"stop": ["dog"]}, {"stop": ("dog",)}),
    ({"extra_body": {"repetition_penalty": 1.5}}, {"repetition_penalty": 1.5}),
]


@pytest.mark.parametrize(("said", "meant"), SETTING)
def test_a_parameter_does_what_the_setting_does(running, answerer, said, meant):
    expected = answerer.answer(QUESTION, settings=replace(SETTINGS, **meant))
    assert text(ask(running, **said)) == expected


def test_draws_come_again_with_their_seed_alone(running):
    drawn = {"temperature": 2.0, "top_p": 0.99, "extra_body": {"top_k": 50}}
    assert text(ask(running, seed=7, **drawn)) == text(ask(running, seed=7, **drawn))
    assert text(ask(running, seed=7, **drawn)) != text(ask(running, seed=8, **drawn))
    assert len({text(ask(running, **drawn)) for _ in range(4)}) > 1


def test_n_answers_and_log_probabilities(running):
    reply = ask(running, n=3, temperature=2.0, seed=1, logprobs=True)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in reply.choices}) > 1
    for choice in reply.choices:
        assert all(token.logprob < 0 for token in choice.logprobs.content)
    told = sum(len(choice.logprobs.content) for choice in reply.choices)
    assert reply.usage.completion_tokens == told


@pytest.mark.parametrize("more", [{}, {"n": 3, "temperature": 2.0, "seed": 1, "logprobs": True}])
def test_a_stream_says_what_the_whole_says(running, more):
    whole = ask(running, **more)
    stream = list(ask(running, **more, stream=True, stream_options={"include_usage": True}))
    assert stream[-1].usage == whole.usage and stream[-1].choices == []
    for choice in whole.choices:
        own = [c.choices[0] for c in stream[:-1] if c.choices[0].index == choice.index]
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        assert own[0].delta.role == "assistant"
        assert own[-1].finish_reason == choice.finish_reason
        assert (own[-1].logprobs and own[-1].logprobs.content) == (
            choice.logprobs and choice.logprobs.content
        )
        assert all(one.finish_reason is None for one in own[:-1])
    assert len({chunk.id for chunk in stream}) == 1
    assert len(stream) > 2 + len(whole.choices), "it did not come in pieces"


def test_a_stream_is_server_sent_events(running):
    body = {"messages": [{"role": "user", "content": QUESTION}], "stream": True}
    reply = running.post("/v1/chat/completions", json=body)
    assert reply.headers["content-type"] == "text/event-stream"
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"messages": [{"role": "user", "content": "dog " * 600}]}, "the model reads 512"),
        ({"media": {"type": "media", "modality": "smell", "url": "0.png"}}, "there are image"),
        ({"media": {"type": "media", "url": "data:;base64,AAAA"}}, "data:"),
        ({"media": {"type": "media", "modality": "audio", "url": "0.png"}}, "0.png"),
        ({"media": {"type": "image_url", "image_url": {"url": "../secret.png"}}}, "secret.png"),
        ({"media": {"type": "image_url", "image_url": {"url": "http://1.1.1.1/x"}}}, "not read"),
        ({"temperature": -1}, "temperature"),
        ({"tools": [{"type": "function"}]}, "tools"),
    ],
)
def test_what_cannot_be_answered_is_a_400_of_one_line(running, change, says, stream):
    medium = change.pop("media", None) if (change := dict(change)) else None
    body = {"messages": [{"role": "user", "content": [medium] if medium else QUESTION}]}
    reply = running.post("/v1/chat/completions", json={**body, **change, "stream": stream})
    error = reply.json()["error"]
    assert reply.status_code == 400, reply.text
    assert says in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


def test_another_model_is_not_here(running):
    with pytest.raises(openai.NotFoundError) as told:
        running.client.chat.completions.create(
            model="gpt-4o", messages=[{"role": "user", "content": "x"}]
        )
    assert told.value.code == "model_not_found"


def test_many_at_once_are_answered_together_and_not_mixed_up(running, answerer):
    from concurrent.futures import ThreadPoolExecutor

    words = [f"What about the {w}?" for w in ("dog", "car", "bird", "red", "brown", "dog car")] * 4
    with ThreadPoolExecutor(len(words)) as pool:
        replies = list(pool.map(lambda question: text(ask(running, question)), words))
    assert replies == [answerer.answer(question, settings=SETTINGS) for question in words]

"""Requests of OpenAI's chat API become questions, and answers its replies."""

from __future__ import annotations

import base64
import copy
import json
import random
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from chatbind_cli.errors import (
    ChatBindError,
    CheckpointError,
    EngineError,
    MediaError,
    RecordError,
    UsageError,
    contained,
)
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.openai_chat import (
    SEEDED,
    ChatRequest,
    RequestError,
    read_chat_request,
)
from chatbind_cli.inference.openai_reply import (
    Head,
    chunk,
    completion,
    error_body,
    final_chunk,
    usage_chunk,
)
from chatbind_cli.inference.questions import Question
from chatbind_cli.media.medium import Medium
from chatbind_cli.model.turns import answer, question
from tests.inference.world import World, inbox_of

SETTINGS = GenerationSettings(max_new_tokens=10)
HEAD = Head("chatcmpl-1", "m", 1_700_000_000)


def read(body: dict[str, Any]) -> ChatRequest:
    return read_chat_request(body, settings=SETTINGS, model_id="m", request_id="r")


def asked(content: Any, **more: Any) -> Question:
    return read({"messages": [{"role": "user", "content": content}], **more}).question


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}


def media(url: str, **more: str) -> dict[str, Any]:
    return {"type": "media", "url": url, **more}


def test_a_plain_request_is_a_question_with_the_settings_of_the_run() -> None:
    request = read({"model": "m", "messages": [{"role": "user", "content": "Hello <image> ###"}]})
    assert not request.stream and not request.include_usage
    said = request.question
    assert (said.text, said.media, said.system) == ("Hello <image> ###", (), None)
    assert said.turns == (question("Hello <image> ###"),)
    assert said.id == "r" and said.settings is None


def test_every_part_names_its_medium() -> None:
    sound = base64.b64encode(b"RIFF").decode()
    parts = [
        image("https://example.org/a.png"),
        {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "clip.mp4"}},
        {"type": "audio_url", "audio_url": {"url": "tone.wav"}},
        media("depth.png", modality="depth"),
        media("x.bin"),
        text("What?"),
    ]
    assert [(m.modality, m.ref) for m in asked(parts).media] == [
        ("image", "https://example.org/a.png"),
        ("audio", f"data:;base64,{sound}"),
        ("video", "clip.mp4"),
        ("audio", "tone.wav"),
        ("depth", "depth.png"),
        (None, "x.bin"),
    ]


def test_parts_stand_on_lines_of_their_own_unless_the_words_part_them() -> None:
    a, b = Medium("image", "a"), Medium("image", "b")
    for parts, content in (
        ([text("What?"), image("a")], question("What?", [a]).content),
        ([image("a"), text("What?")], (a, "\n", "What?")),
        ([image("a"), image("b"), text("")], (a, "\n", b)),
        ([text("Is "), image("a"), text(" or\n"), image("b")], ("Is ", a, " or\n", b)),
        ([text("One."), text("Two.")], ("One.", "\n", "Two.")),
    ):
        assert asked(parts).turns[0].content == content


def test_turns_alternate_and_neighbours_of_one_role_are_one() -> None:
    messages = [
        {"role": "developer", "content": [text("Be"), text("short.")]},
        {"role": "user", "content": [image("a")]},
        {"role": "user", "content": "What?", "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": None, "refusal": None, "audio": None},
        {"role": "assistant", "content": "A <image>."},
        {"role": "user", "content": [text("And"), image("b")]},
    ]
    said = read({"messages": messages}).question
    first, second = Medium("image", "a"), Medium("image", "b")
    assert said.system == "Be\nshort."
    assert [turn.content for turn in said.turns] == [
        (first, "\n", "What?"),
        answer("A <image>.").content,
        ("And", "\n", second),
    ]
    assert said.media == (first, second)
    assert said.earlier == (("human", "<image>\nWhat?"), ("gpt", "A <image>."))
    assert said.text == "And\n<image>"


def test_settings_go_by_openais_names_and_null_says_nothing() -> None:
    said = asked(
        "Hi",
        max_completion_tokens=7,
        max_tokens=7,
        temperature=1,
        top_p=0.5,
        n=3,
        seed=11,
        stop="END",
        logprobs=True,
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.2,
    )
    assert said.settings == GenerationSettings(
        max_new_tokens=7,
        temperature=1.0,
        top_p=0.5,
        samples=3,
        seed=11,
        stop=("END",),
        logprobs=True,
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.2,
    )
    assert said.id == SEEDED
    nothing = dict.fromkeys(("temperature", "stop", "seed", "n", "stream_options", "tools"))
    assert asked("Hi", **nothing).settings is None
    assert asked("Hi", **nothing).id == "r"
    neutral = {"presence_penalty": 0.0, "tools": [], "response_format": {"type": "text"}}
    assert asked("Hi", **neutral, user="me", metadata={"a": 1}).settings is None
    assert asked("Hi", stop=["a", "b"]).settings == replace(SETTINGS, stop=("a", "b"))


def test_a_stream_is_asked_for() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    more = {"stream": True, "stream_options": {"include_usage": True}}
    request = read({"messages": messages, **more})
    assert request.stream and request.include_usage


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("body", "param", "what"),
    [
        ({}, "messages", "must be a list"),
        ({"messages": []}, "messages", "must be a list"),
        ({"messages": "Hi"}, "messages", "must be a list"),
        ({"messages": [USER] * 1001}, "messages", "are too many"),
        ({"messages": [{**USER, "content": [text("a")] * 1001}]}, "messages", "are too many"),
        ({"messages": [{**USER, "content": [image("a")] * 65}]}, "messages", "more than 64 media"),
        ({"messages": ["Hi"]}, "messages[0]", "must be an object, not 'Hi'"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role", "is null; there are system"),
        ({"messages": [{**USER, "role": ["user"]}]}, "messages[0].role", "is a list"),
        ({"messages": [{**USER, "role": "tool"}]}, "messages[0].role", "is 'tool'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "must be text or a list"),
        ({"messages": [{**USER, "content": 3}]}, "messages[0].content", "must be text or a list"),
        ({"messages": [{**USER, "content": []}]}, "messages[0].content", "must be text or a list"),
        ({"messages": [{**USER, "content": " \n"}]}, "messages[0].content", "is empty"),
        (
            {"messages": [USER, {"role": "system", "content": "x"}, USER]},
            "messages[1].role",
            "only the first",
        ),
        (
            {"messages": [{"role": "system", "content": [image("a")]}, USER]},
            "messages[0].content",
            "only the user's",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x"}, USER]},
            "messages[0].role",
            "begins with the user",
        ),
        (
            {"messages": [{"role": "system", "content": "x"}]},
            "messages[0].role",
            "must be from the user",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "x"}]},
            "messages[1].role",
            "must be from the user",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{}]}, USER]},
            "messages[1].tool_calls",
            "is not read",
        ),
    ],
)
def test_messages_that_are_none(body: dict[str, Any], param: str, what: str) -> None:
    refused(body, param, what)


@pytest.mark.parametrize(
    ("part", "param", "what"),
    [
        ("Hi", "", "must be an object"),
        ({}, "", "is of the type null; there are text, image_url"),
        ({"type": "file"}, "", "is of the type 'file'"),
        ({"type": ["text"]}, "", "is of the type a list"),
        ({"type": "text"}, ".text", "must be text, not null"),
        ({"type": "text", "text": 5}, ".text", "must be text, not 5"),
        ({"type": "image_url"}, ".image_url", "must be an object"),
        ({"type": "image_url", "image_url": "a.png"}, ".image_url", "must be an object"),
        ({"type": "image_url", "image_url": {}}, ".image_url.url", "must be text"),
        ({"type": "image_url", "image_url": {"url": ""}}, ".image_url.url", "is empty"),
        (image("x" * 10_001), ".image_url.url", "too long an address"),
        ({"type": "input_audio", "input_audio": {}}, ".input_audio.data", "must be text"),
        (
            {"type": "input_audio", "input_audio": {"data": "", "format": 1}},
            ".input_audio.format",
            "must be text, not 1",
        ),
        (media("x", modality="smell"), ".modality", "is 'smell'; there are image, video"),
        ({"type": "media", "url": "x", "modality": 1}, ".modality", "must be text"),
        ({"type": "media"}, ".url", "must be text"),
    ],
)
def test_parts_that_are_none(part: Any, param: str, what: str) -> None:
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": [text("a"), part]}]
    refused({"messages": messages}, f"messages[1].content[1]{param}", what)


@pytest.mark.parametrize(
    ("more", "param", "what"),
    [
        ({"model": 3}, "model", "must be text, not 3"),
        ({"stream": "yes"}, "stream", "must be true or false, not 'yes'"),
        ({"stream_options": []}, "stream_options", "must be an object"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "must be true"),
        ({"tools": [{}]}, "tools", "cannot be a list here"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "cannot be an object"),
        ({"top_logprobs": 2}, "top_logprobs", "cannot be 2 here"),
        ({"presence_penalty": 0.5}, "presence_penalty", "cannot be 0.5"),
        ({"frequency_penalty": -1}, "frequency_penalty", "cannot be -1"),
        ({"response_format": {"type": "json_object"}}, "response_format", "cannot be an object"),
        ({"max_token": 5}, "max_token", "is no parameter of a request; did you mean max_tokens?"),
        ({"temperature": "hot"}, "temperature", "must be a number, not 'hot'"),
        ({"temperature": -1}, "temperature", "is -1; it must lie between"),
        ({"max_tokens": 0}, "max_tokens", "is 0; it must lie between 1"),
        ({"max_tokens": True}, "max_tokens", "must be a whole number"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens", "must be a whole number"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differs from"),
        ({"top_p": 0}, "top_p", "is 0; it must lie above 0"),
        ({"n": 2}, "n", "several samples of a greedy answer; give a temperature"),
        ({"n": 129, "temperature": 1}, "n", "is 129; 128 are the most"),
        ({"n": 10**6, "temperature": 1}, "n", "it must lie between 1"),
        ({"stop": ["a", 1]}, "stop", "must be a text or a list of texts"),
        ({"stop": [""]}, "stop", "a stop text is empty"),
        ({"stop": ["x"] * 65}, "stop", "too many stop texts"),
        ({"seed": -1}, "seed", "is -1"),
        ({"logprobs": 1}, "logprobs", "must be true or false"),
        ({"top_k": 0.5}, "top_k", "must be a whole number"),
    ],
)
def test_parameters_that_cannot_be_honoured(more: dict[str, Any], param: str, what: str) -> None:
    refused({"messages": [USER], **more}, param, what)


def refused(body: dict[str, Any], param: str, what: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(body)
    line = str(caught.value)
    assert caught.value.param == param and what in line and line.startswith(f"{param}: ")
    assert "\n" not in line and len(line) < 300
    status, said = error_body(caught.value)
    assert status == 400
    assert said["error"] == {
        "message": line,
        "type": "invalid_request_error",
        "param": param,
        "code": None,
    }


def test_another_model_is_not_found_unless_any_will_do() -> None:
    body = {"model": "gpt-4o", "messages": [USER]}
    with pytest.raises(RequestError, match="there is no model 'gpt-4o'; there is m") as caught:
        read(body)
    status, said = error_body(caught.value)
    assert (status, said["error"]["code"]) == (404, "model_not_found")
    request = read_chat_request(body, settings=SETTINGS, model_id=None, request_id="r")
    assert request.question.text == "Hi"


ODD: list[Any] = [None, True, -1, 2.5, 10**400, "", "x", "<image>", [], {}, [[]], [{}], {"a": []}]


def test_no_body_whatever_does_more_than_be_refused() -> None:
    whole = {
        "model": "m",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [text("a"), image("b"), media("c", modality="imu")]},
            {"role": "assistant", "content": [text("d")]},
            {
                "role": "user",
                "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}],
            },
        ],
        "temperature": 0.5,
        "stop": ["x"],
        "n": 2,
        "stream_options": {"include_usage": True},
        "response_format": {"type": "text"},
    }
    read(whole)
    drawn = random.Random(0)
    places = list(_places(whole))
    outcomes = set()
    for _ in range(3000):
        body = copy.deepcopy(whole)
        for path in drawn.sample(places, drawn.randint(1, 3)):
            _put(body, path, copy.deepcopy(drawn.choice(ODD)))
        try:
            read(body)
            outcomes.add("read")
        except RequestError as error:
            assert error.param and "\n" not in str(error) and len(str(error)) < 300
            json.dumps(error_body(error))
            outcomes.add(error.param)
    assert len(outcomes) > 20


def _places(value: Any, path: tuple[Any, ...] = ()) -> Any:
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(inner, (*path, key))


def _put(value: Any, path: tuple[Any, ...], odd: Any) -> None:
    with suppress(TypeError, KeyError, IndexError):  # another odd value stands there already
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = odd


@pytest.fixture(scope="module")
def answerer(world: World) -> Answerer:
    return Answerer.from_pretrained(world.model, device="cpu")


def test_a_placeholder_in_the_words_stays_words_beside_real_media(
    world: World, answerer: Answerer
) -> None:
    picture, other = str(world.media / "1.png"), str(world.media / "2.png")
    messages = [
        {"role": "user", "content": [text("Not <image> but"), image(picture)]},
        {"role": "assistant", "content": "A <image>."},
        {"role": "user", "content": [text("And <image>?"), media(other)]},
    ]
    [prepared] = answerer.prepare([read({"messages": messages}).question])
    assert prepared.problem is None and prepared.prompt is not None
    assert [medium.ref for medium in prepared.prompt.media] == [picture, other]
    config, ids = answerer.model.config, prepared.prompt.input_ids
    assert ids.count(config.im_patch_id) == 2 * config.tokens_per_embedding
    written = answerer.prompts._tokenizer.decode(ids, skip_special_tokens=True)
    for words in ("Not <image> but", "A <image>.", "And <image>?"):
        assert words in written


def test_the_same_words_and_media_are_asked_as_by_a_record(
    world: World, answerer: Answerer
) -> None:
    picture = str(world.media / "1.png")
    [mine] = answerer.prepare([asked([text("What is this?"), image(picture)])])
    [theirs] = answerer.prepare([Question("What is this?", (Medium("image", picture),))])
    assert mine.prompt is not None and theirs.prompt is not None
    assert mine.prompt.input_ids == theirs.prompt.input_ids


def test_a_broken_medium_fails_its_question(answerer: Answerer) -> None:
    [prepared] = answerer.prepare([asked([text("What?"), image("missing.png")])])
    assert isinstance(prepared.problem, MediaError)


def answered(answerer: Answerer, question: Question) -> tuple[Question, Generated]:
    [(prepared, outcome)] = answerer.run(inbox_of([question]), SETTINGS)
    assert isinstance(outcome, Generated)
    return prepared, outcome


def test_the_real_client_reads_a_reply(world: World, answerer: Answerer) -> None:
    parts = [text("What is this?"), image(str(world.media / "1.png"))]
    prepared, outcome = answered(
        answerer, asked(parts, n=2, temperature=2.0, logprobs=True, seed=1)
    )
    assert prepared.prompt is not None
    reply = ChatCompletion.model_validate(json.loads(json.dumps(completion(HEAD, outcome))))
    assert (reply.id, reply.model, reply.created) == ("chatcmpl-1", "m", 1_700_000_000)
    assert [choice.index for choice in reply.choices] == [0, 1]
    for choice, sample in zip(reply.choices, outcome.samples, strict=True):
        assert choice.message.content == sample.text and choice.message.role == "assistant"
        assert choice.finish_reason == sample.finish_reason
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert [t.token for t in choice.logprobs.content] == list(sample.tokens or ())
        for token in choice.logprobs.content:
            assert bytes(token.bytes or []).decode() == token.token
            assert token.logprob <= 0 and token.top_logprobs == []
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(prepared.prompt.input_ids)
    assert reply.usage.completion_tokens == sum(sample.n_tokens for sample in outcome.samples)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_the_real_client_reads_a_stream() -> None:
    whole = Generated("A dog.", 2, "length", ("A", " dog."), (-0.5, float("-inf")), n_prompt=9)
    chunks = [
        chunk(HEAD, 0, "", first=True),
        chunk(HEAD, 0, "A dog."),
        final_chunk(HEAD, 0, whole),
        usage_chunk(HEAD, whole),
    ]
    read = [ChatCompletionChunk.model_validate(json.loads(json.dumps(c))) for c in chunks]
    assert {c.id for c in read} == {"chatcmpl-1"}
    first, piece, last = (c.choices[0] for c in read[:3])
    assert (first.delta.role, first.delta.content) == ("assistant", "")
    assert (piece.delta.role, piece.delta.content) == (None, "A dog.")
    assert piece.finish_reason is None and last.finish_reason == "length"
    assert last.logprobs is not None and last.logprobs.content is not None
    assert [t.logprob for t in last.logprobs.content] == [-0.5, -9999.0]
    assert read[3].choices == [] and read[3].usage is not None
    assert (read[3].usage.prompt_tokens, read[3].usage.completion_tokens) == (9, 2)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MediaError("is broken", where="x.png"), 400),
        (RecordError("is too long"), 400),
        (UsageError("an engine cannot take it"), 400),
        (CheckpointError("the chat template takes no system text"), 400),
        (EngineError("is gone"), 503),
        (ChatBindError("is odd"), 500),
        (contained(KeyError("x"), where="the question"), 500),
        (KeyError("/secret/path"), 500),
    ],
)
def test_errors_have_openais_form(error: Exception, status: int) -> None:
    found, said = error_body(error)
    assert found == status and set(said["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in said["error"]["message"]

"""Question records: every key that says how to ask, and keys that look like one."""

from __future__ import annotations

from typing import Any

import pytest

from chatbind_cli.errors import RecordError
from chatbind_cli.inference.answer_record import AnswerRecords
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.decoding import Generated, ScoredChoice
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.question_record import odd_keys_noted, read_question
from chatbind_cli.inference.questions import Question
from chatbind_cli.jsonl import Line
from tests.inference.world import World

RUN = GenerationSettings(max_new_tokens=8)


def read(choose: bool = False, **more: Any) -> Question:
    record = {"question_id": 1, "text": "What is it?", **more}
    return read_question(Line(record, "q:1", 1), RUN, choices=choose)


TURNS = [
    {"from": "human", "value": "<image> And this?"},
    {"from": "gpt", "value": "A <audio> dog."},
]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"system": 1}, "q:1: system must be text"),
        ({"mix": "yes"}, "mix must be true or false"),
        ({"image": ["a", "b"], "weights": [1]}, "1 weights for 2 media"),
        ({"weights": [1]}, "1 weights for 0 media"),
        ({"image": ["a"] * 10_001}, "10,001 media; 10,000 are the most"),
        ({"image": "a", "weights": ["1"]}, "weights must be a finite number"),
        ({"image": "a", "weights": True}, "weights must be a finite number"),
        ({"image": "a", "weights": 10**400}, "weights must be a finite number"),
        ({"image": "a", "weights": float("nan")}, "weights must be a finite number"),
        ({"generation": 3}, "generation must be an object"),
        (
            {"generation": {"temperatures": 1}},
            r"no setting of generation; did you mean temperature",
        ),
        ({"generation": {"max_new_tokens": 1e9}}, "max_new_tokens must be a whole number"),
        ({"generation": {"max_new_tokens": 10**9}}, "max_new_tokens is 1000000000; it must lie"),
        ({"generation": {"temperature": float("nan")}}, "temperature is nan"),
        ({"generation": {"temperature": 10**400}}, "temperature is 1000"),
        ({"generation": {"temperature": "0.5"}}, "temperature must be a number, not '0.5'"),
        ({"generation": {"top_k": True}}, "top_k must be a whole number"),
        ({"generation": {"logprobs": 1}}, "logprobs must be true or false"),
        ({"generation": {"stop": [1]}}, "stop must be a text or a list of texts"),
        ({"generation": {"stop": "x" * 5000}}, "too many stop texts, or too long ones"),
        ({"generation": {"samples": 2}}, "several samples of a greedy answer"),
        ({"conversations": TURNS[:1]}, "the last turn is not an answer"),
        ({"conversations": TURNS * 2 + TURNS[1:]}, "are both from gpt"),
        ({"conversations": "hello"}, "conversations must be a list"),
        ({"conversations": [{"from": "robot", "value": ""}]}, "turn 1 is from 'robot'"),
    ],
)
def test_what_is_wrong_with_a_record_is_its_own_problem(more: dict[str, Any], message: str) -> None:
    problem = read(**more).problem
    assert isinstance(problem, RecordError)
    assert str(problem).startswith("q:1: ")
    with pytest.raises(RecordError, match=message):
        raise problem


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "a question leaves no choices"),
        ({"choices": []}, "choices must be a list of texts"),
        ({"choices": {"A": "cat"}}, "choices must be a list of texts"),
        ({"choices": ["cat", " "]}, "choice 2 is empty"),
        ({"choices": ["cat", ["dog"]]}, "choice 2 is no text"),
        ({"choices": ["cat", True]}, "choice 2 is no text"),
        ({"choices": ["cat"] * 10_001}, "10,001 choices; 10,000 are the most"),
    ],
)
def test_choices_that_are_none_are_told(more: dict[str, Any], message: str) -> None:
    problem = read(choose=True, **more).problem
    assert message in str(problem)
    assert read(**more).problem is None


@pytest.mark.parametrize(
    ("more", "choices"),
    [
        ({"choices": ["a cat", " a dog ", 3, "a cat"]}, ("a cat", "a dog", "3", "a cat")),
        ({"options": ["x", "y"]}, ("x", "y")),
        ({"text": "What is it?\nA. cat\nB. dog\nAnswer with the option's letter."}, ("A", "B")),
        ({"text": "Context: N/A\nOptions: (A) West Virginia (B) Louisiana (C) x"}, tuple("ABC")),
        ({"text": "There are several options:\nA. 1\nB. 2\nC. 3\nD. 4\n"}, tuple("ABCD")),
    ],
)
def test_choices_are_listed_or_letters_of_the_text(more: Any, choices: tuple[str, ...]) -> None:
    assert read(choose=True, **more).choices == choices
    assert read(**more).choices == ()


def test_a_records_own_settings_go_over_the_runs() -> None:
    own = read(generation={"temperature": 0.5, "stop": "x"}).settings
    assert own == GenerationSettings(max_new_tokens=8, temperature=0.5, stop=("x",))
    assert read(generation={"max_new_tokens": 8}).settings is None
    assert read().settings is None


def test_every_setting_may_be_a_records_own() -> None:
    changed = {
        "max_new_tokens": 3,
        "temperature": 1,
        "top_p": 0.5,
        "top_k": 4,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 2,
        "num_beams": 2,
        "length_penalty": -1.0,
        "samples": 3,
        "logprobs": True,
        "seed": 5,
        "stop": ["x"],
    }
    assert changed.keys() == GenerationSettings.__dataclass_fields__.keys()
    for name, value in changed.items():
        own = read(generation={"temperature": 1, name: value}).settings
        wanted = tuple(value) if name == "stop" else value
        assert own is not None
        assert getattr(own, name) == wanted
        # JSON's 1 is no float, which the library insists on
        assert isinstance(own.temperature, float)


def test_weights_are_one_for_all_or_one_each() -> None:
    media = {"image": ["a", "b"], "audio": "c"}
    assert [m.weight for m in read(**media, weights=0.5).media] == [0.5] * 3
    assert [m.weight for m in read(**media, weights=[1, -2, 0]).media] == [1.0, -2.0, 0.0]
    assert [m.weight for m in read(**media).media] == [1.0] * 3


def test_what_a_record_says_of_its_asking_reaches_the_prompt(world: World) -> None:
    answerer = Answerer.from_pretrained(world.model, device="cpu")
    image = {"image": [str(world.media / "1.png"), str(world.media / "2.png")]}

    def prompt(**more: Any) -> tuple[str, list[list[float]]]:
        [question] = answerer.prepare([read(**more)])
        assert question.problem is None, question.problem
        assert question.prompt is not None
        rows = [m.embedding.tolist() for m in question.prompt.media if m.embedding is not None]
        text = answerer.prompts._tokenizer.decode(question.prompt.input_ids)
        return text, [[m.weight, *row] for m, row in zip(question.prompt.media, rows, strict=True)]

    plain, both = prompt(**image)
    told, _ = prompt(system="It is a dog.", **image)
    assert told == plain.replace(plain.partition(" USER:")[0], "<s> It is a dog.")
    _, weighted = prompt(weights=[0.5, 1], **image)
    assert [row[0] for row in weighted] == [0.5, 1.0]
    _, mixed = prompt(mix=True, weights=[0.5, 1], **image)
    assert len(both) == 2
    assert len(mixed) == 1
    later, in_order = prompt(conversations=TURNS, **image)
    # the first image is that of the earlier turn, and an answer has no placeholders
    said = later.partition("USER:")[2]
    patch = "<im_start><im_patch><im_end>"
    assert said.replace(" ", "").startswith(f"{patch}Andthis?ASSISTANT:A<audio>dog.</s>")
    assert said.rstrip().removesuffix("ASSISTANT:").rstrip().endswith(patch)
    assert in_order == both
    short = read(conversations=[*TURNS, {**TURNS[0], "value": "<image><image>"}, TURNS[1]], **image)
    [failed] = answerer.prepare([short])
    assert "3 <image> placeholders but 2 image input(s)" in str(failed.problem)
    [long] = answerer.prepare([read(system="x" * 1_000_000)])
    assert "1,000,011 characters" in str(long.problem)


def test_a_key_that_looks_like_ours_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    records: list[dict[str, Any]] = [
        {"question_id": 1, "imag": "x", "question": "What?", "category": "a", "image_id": 3},
        {"question_id": 2, "imag": "y", "temperature": 1, "text": "?", "prompt": "old"},
        {"question_id": 3, "x" * 100_000: 1, "split": "test", "Weights": 2, "systems": ""},
    ]
    lines = [Line(record, f"q:{n}", n) for n, record in enumerate(records, start=1)]
    assert list(odd_keys_noted(iter(lines))) == lines
    noted = capsys.readouterr().err.splitlines()
    assert sorted(noted) == [
        "chatbind: q:1: the key imag means nothing here; is image meant?",
        "chatbind: q:1: the key question means nothing here; is text meant?",
        "chatbind: q:2: the key temperature means nothing here; is generation meant?",
        "chatbind: q:3: the key Weights means nothing here; is weights meant?",
        "chatbind: q:3: the key systems means nothing here; is system meant?",
    ]


def test_an_answer_tells_what_it_was_asked_for() -> None:
    def record(question: Question, generated: Generated) -> dict[str, Any]:
        return AnswerRecords("m", {"temperature": 0.0}).answer(question, generated)

    once = Generated("a b", 2, "stop", ("a", " b"), (-0.5, -0.25))
    tokens = [{"token": "a", "logprob": -0.5}, {"token": " b", "logprob": -0.25}]
    assert record(read(), once)["logprobs"] == tokens
    twice = Generated("a b", 2, "stop", samples=(once, Generated("c", 1, "length")))
    assert record(read(), twice)["samples"] == [
        {"text": "a b", "n_tokens": 2, "finish_reason": "stop", "logprobs": tokens},
        {"text": "c", "n_tokens": 1, "finish_reason": "length"},
    ]
    choices = (ScoredChoice("x", -3.0, 2), ScoredChoice("y", -1.0, 4))
    scored = record(
        read(choose=True, options=["x", "y"]),
        Generated("y", 4, "stop", choices=choices),
    )
    assert scored["choices"] == [
        {"text": "x", "logprob": -3.0, "logprob_per_token": -1.5},
        {"text": "y", "logprob": -1.0, "logprob_per_token": -0.25},
    ]
    own = record(read(generation={"temperature": 0.5}), once)
    assert own["metadata"]["generation"] == {"temperature": 0.5}
    assert own["metadata"]["temperature"] == 0.0
    assert "generation" not in own
    same = record(read(generation={"temperature": 0.0}), once)
    assert "generation" not in same["metadata"]


def test_the_id_of_an_answer_depends_on_how_it_was_asked() -> None:
    ways: list[dict[str, Any]] = [
        {"image": "x"},
        {"image": "x", "weights": 2},
        {"image": "x", "mix": True},
        {"image": "x", "system": "s"},
        {"image": "x", "conversations": TURNS},
        {"image": "x", "generation": {"temperature": 0.5}},
    ]
    made = [
        AnswerRecords("m", {}).answer(read(**way), Generated("a", 1, "stop"))
        for way in [*ways, {"image": "x", "weights": 1}]
    ]
    ids = [record["answer_id"] for record in made]
    assert len(set(ids)) == len(ways)
    assert ids[0] == ids[-1]

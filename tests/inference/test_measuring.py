"""`vqa` as a measure: choices, several samples, log-probabilities, every setting of generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from chatbind_cli import cli
from chatbind_cli.errors import SomeRecordsFailed, UsageError
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.questions import Question
from tests.inference.test_vqa import lines, vqa, words
from tests.inference.world import World, questions, read_jsonl, write_jsonl


def answered(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_choices_are_scored_and_a_question_without_any_fails(world: World) -> None:
    asked = [
        {"question_id": 1, "text": "What is it?", "image": "2.png", "choices": ["a car", "dog"]},
        {"question_id": 2, "text": "What is it?\nA. car\nB. dog", "image": "2.png"},
        {"question_id": 3, "text": "What is it?"},
        {"question_id": 4, "text": "What is it?", "choices": ["car " * 600, "dog"]},
    ]
    result = vqa(world, "--choices", stdin=lines(asked))
    assert isinstance(result.exception, SomeRecordsFailed)
    first, second, third, fourth = answered(result)
    assert [choice["text"] for choice in first["choices"]] == ["a car", "dog"]
    assert [choice["text"] for choice in second["choices"]] == ["A", "B"]
    for record in (first, second):
        best = max(record["choices"], key=lambda choice: choice["logprob"])
        assert record["text"] == best["text"]
        assert record["metadata"]["choices"] is True
        assert "temperature" not in record["metadata"]
    assert "a question leaves no choices" in third["error"]
    assert "choice 1 has" in fourth["error"]
    # what one is told does not depend on the others
    alone = answered(vqa(world, "--choices", stdin=lines(asked[1:2])))
    assert alone == [second]
    unscored = answered(vqa(world, stdin=lines(asked[:1])))[0]
    assert unscored["choices"] == ["a car", "dog"]
    refused = vqa(world, "--choices", "--logprobs", stdin=lines(asked))
    assert isinstance(refused.exception, UsageError)


def test_chosen_and_failed_answers_are_reviewed(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    animals = ["dog", "brown dog", "not a dog", "bird"]
    asked: list[dict[str, Any]] = [
        {"question_id": n, "text": "What?", "choices": animals, "answer": animals[n % 4]}
        for n in range(6)
    ]
    asked += [{"question_id": 6, "text": "What?", "answer": "dog"}, {"text": "no id"}]
    path, out = write_jsonl(tmp_path / "q.jsonl", asked), tmp_path / "a.jsonl"
    assert cli.run([*words(world), "-q", str(path), "-o", str(out), "--choices"])[0] == 3
    records = read_jsonl(out)
    # whoever knows no errors finds an empty answer
    assert [record["text"] for record in records[6:]] == ["", ""]
    assert all(records[0].keys() - {"choices", "answer"} <= record.keys() for record in records)
    review = tmp_path / "r.jsonl"
    line = ["review", "-q", path, "--answer-list", out, out, "--judge", "rule", "-o", review]
    assert cli.run([str(word) for word in line])[0] == 3
    # a line of the questions that was none is no answer to anything
    assert "a.jsonl: cannot be used" not in capsys.readouterr().err
    verdicts = read_jsonl(review)
    assert [v.get("metadata", {}).get("correct") for v in verdicts[:6]] == [
        [record["text"] == record["answer"]] * 2 for record in records[:6]
    ]
    assert {tuple(v["metadata"]["correct"]) for v in verdicts[:6]} == {(True,) * 2, (False,) * 2}
    assert "failed (" in verdicts[6]["error"]
    assert "no question_id" in verdicts[7]["error"]


def test_a_limit_answers_the_first_questions(world: World, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", questions(6))
    limited = vqa(world, "-q", path, "--limit", "5")
    assert limited.exception is None
    assert [record["question_id"] for record in answered(limited)] == list(range(5))
    assert limited.stdout == "".join(vqa(world, "-q", path).stdout.splitlines(True)[:5])


def test_records_change_how_they_are_asked(world: World) -> None:
    plain = {"question_id": 1, "text": "What about the bird?", "image": "2.png"}
    ways: list[dict[str, Any]] = [
        {},
        {"weights": 5},
        {"system": "It is a dog."},
        {"generation": {"max_new_tokens": 2}},
        {"generation": {"temperature": 5.0, "seed": 3}},
        {"conversations": [{"from": "human", "value": "red?"}, {"from": "gpt", "value": "dog"}]},
    ]
    asked = [{**plain, "question_id": n, "systems": "x", **way} for n, way in enumerate(ways)]
    result = vqa(world, stdin=lines(asked))
    assert result.stderr.count("the key systems means nothing here; is system meant?") == 1
    records = answered(result)
    assert len({record["text"] for record in records}) == len(ways)
    assert records[3]["metadata"]["generation"] == {"max_new_tokens": 2}
    assert records[3]["metadata"]["n_tokens"] == 2
    # the run's, as far as a record has none of its own
    assert records[4]["metadata"]["n_tokens"] <= 8


ASKED = [{"question_id": n, "text": text} for n, text in enumerate(["Describe a bird.", "So?"])]
WARM = ("--temperature", "2.0")


def texts(world: World, *options: str) -> list[str]:
    result = vqa(world, *options, stdin=lines(ASKED))
    assert result.exception is None, result.exception
    return [record["text"] for record in answered(result)]


@pytest.mark.parametrize(
    "options",
    [
        [*WARM, "--top-k", "1"],
        [*WARM, "--min-p", "1.0"],
        [*WARM, "--top-p", "0.000001"],
        ["--temperature", "0.0001"],
    ],
)
def test_what_narrows_a_draw_to_the_likeliest_gives_the_greedy_answer(
    world: World, options: list[str]
) -> None:
    assert texts(world, *WARM) != texts(world)
    assert texts(world, *options) == texts(world)


@pytest.mark.parametrize(
    "options",
    [
        ["--repetition-penalty", "50"],
        ["--no-repeat-ngram-size", "1"],
        ["--max-new-tokens", "3"],
        ["--num-beams", "3"],
        ["--stop", "t"],
        [*WARM, "--seed", "1"],
        [*WARM, "--seed", "2"],
    ],
)
def test_every_other_setting_changes_answers(world: World, options: list[str]) -> None:
    assert texts(world, *options) != texts(world)


def test_beams_prefer_the_length_that_they_are_told_to(world: World) -> None:
    beams = ["--num-beams", "4", "--max-new-tokens", "30", "--length-penalty"]
    short, long = (texts(world, *beams, penalty) for penalty in ("-10", "10"))
    assert short != long


def test_samples_are_drawn_one_by_one_and_the_first_is_the_answer(world: World) -> None:
    one = answered(vqa(world, *WARM, stdin=lines(ASKED)))
    many = answered(vqa(world, *WARM, "--samples", "4", "--logprobs", stdin=lines(ASKED)))
    for single, several in zip(one, many, strict=True):
        samples = several["samples"]
        assert samples[0]["text"] == several["text"] == single["text"]
        assert len({sample["text"] for sample in samples}) > 1
        assert len(samples) == several["metadata"]["samples"] == 4
        assert all(len(sample["logprobs"]) == sample["n_tokens"] for sample in samples)
        assert samples[0]["logprobs"]
        assert "samples" not in single
    greedy = vqa(world, "--samples", "2", stdin=lines(ASKED))
    assert "several samples of a greedy answer" in str(greedy.exception)


def test_each_token_of_an_answer_tells_how_likely_it_was(world: World) -> None:
    asked = {"question_id": 1, "text": "What is it?"}
    answerer = Answerer.from_pretrained(world.model, device="cpu")
    [question] = answerer.prepare([Question("What is it?")])
    assert question.prompt is not None
    wanted: list[float] = []
    ids = list(question.prompt.input_ids)
    never = answerer.model.generation_config.suppress_tokens or []
    for _ in range(8):
        with torch.inference_mode():
            logits = answerer.model(input_ids=torch.tensor([ids])).logits[0, -1]
        logprobs = logits.log_softmax(-1)
        ids.append(int(logits.index_fill(0, torch.tensor(never).long(), -1e9).argmax()))
        wanted.append(float(logprobs[ids[-1]]))
    [greedy] = answered(vqa(world, "--logprobs", stdin=lines([asked])))
    assert [item["logprob"] for item in greedy["logprobs"]] == pytest.approx(wanted, abs=1e-5)


def test_ask_tells_them_in_its_record(world: World) -> None:
    line = ["ask", "-m", str(world.model), "What is it?", "--max-new-tokens", "3", "--logprobs"]
    assert "add --json" in str(CliRunner().invoke(cli.app, line).exception)
    record = json.loads(CliRunner().invoke(cli.app, [*line, "--json"]).stdout)
    assert len(record["logprobs"]) == 3

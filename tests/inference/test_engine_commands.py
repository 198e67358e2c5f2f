"""`ask` and `vqa` with `--engine`: the real commands against the server of ours."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from chatbind_cli import cli
from chatbind_cli.errors import EngineError, SomeRecordsFailed, UsageError
from chatbind_cli.jsonl import dumps
from tests.inference.world import questions, read_jsonl, write_jsonl

NOT_COMPARED = {"metadata", "answer_id"}


def call(command, world, *more, stdin=None):
    fixed = [command, "-m", world.model, "--device", "cpu", "--max-new-tokens", "8"]
    return CliRunner().invoke(cli.app, [*map(str, (*fixed, *more))], input=stdin)


def compared(path):
    return [
        {key: value for key, value in record.items() if key not in NOT_COMPARED}
        for record in read_jsonl(path)
    ]


def test_vqa_writes_the_answers_of_the_model_here(world, start, tmp_path):
    asked = write_jsonl(tmp_path / "questions.jsonl", questions(10))
    words = ["-q", asked, "--media-root", world.media]
    assert call("vqa", world, *words, "-o", tmp_path / "here.jsonl").exception is None
    first, second = start(), start()
    engines = ["--engine", first.url, "--engine", second.url]
    there = tmp_path / "there.jsonl"
    assert call("vqa", world, *words, *engines, "-o", there).exception is None
    assert compared(there) == compared(tmp_path / "here.jsonl")
    # the probe, and more or less half of the questions each
    assert min(len(first.requests), len(second.requests)) > 3
    metadata = read_jsonl(there)[0]["metadata"]
    assert metadata["engine"] == "remote"
    assert len(metadata["model_sha256"]) == 64
    whole = there.read_bytes()
    there.write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))
    assert call("vqa", world, *words, *engines, "-o", there).exception is None
    assert there.read_bytes() == whole


def test_the_batch_size_is_what_is_asked_at_a_time(world, start, tmp_path):
    asked = write_jsonl(tmp_path / "questions.jsonl", questions(12))
    for more, most in ((["--batch-size", "2"], 2), ([], 12)):
        server = start()
        server.step_seconds = 0.01
        words = ["-q", asked, "--media-root", world.media, "--engine", server.url, *more]
        assert call("vqa", world, *words).exception is None
        assert most / 2 < server.most_at_a_time <= most


def test_a_question_fails_alone_and_a_dead_engine_ends_the_run(world, start, tmp_path):
    records = questions(9)
    records[2]["image"] = "nowhere.png"
    records[4]["generation"] = {"num_beams": 3}
    asked = write_jsonl(tmp_path / "questions.jsonl", records)
    out = tmp_path / "answers.jsonl"
    words = ["-q", asked, "--media-root", world.media, "-o", out]
    server = start()
    server.faults.extend([None] * 4 + ["die"])
    ended = call("vqa", world, *words, "--engine", server.url, "--batch-size", "2")
    assert isinstance(ended.exception, EngineError)
    assert "no engine is left" in str(ended.exception)
    done = read_jsonl(out)
    assert 2 <= len(done) < 9
    again = call("vqa", world, *words, "--engine", start().url)
    assert isinstance(again.exception, SomeRecordsFailed)
    after = read_jsonl(out)
    assert [record["question_id"] for record in after] == list(range(9))
    assert [r["question_id"] for r in after if "error" in r] == [2, 4]
    assert "an engine cannot take num_beams" in after[4]["error"]
    good = [record for record in done if "error" not in record]
    assert good == [after[record["question_id"]] for record in good]


def test_ask_and_its_dialogue_say_the_same(world, start):
    engine = ["--engine", start().url]
    one = ["-a", world.media / "2.png", "What is this?"]
    assert call("ask", world, *one, *engine).stdout == call("ask", world, *one).stdout
    turns = f"What is this?\n/attach {world.media / '3.png'}\nAnd this?\n"
    here = call("ask", world, "--chat", stdin=turns)
    there = call("ask", world, "--chat", *engine, stdin=turns)
    assert there.exception is None
    assert there.stdout == here.stdout
    record = json.loads(call("ask", world, *one, *engine, "--json").stdout)
    assert record["text"] == call("ask", world, *one).stdout.strip()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--num-beams", "2"], "num_beams"),
        (["--repetition-penalty", "1.1"], "repetition_penalty"),
        (["--attn-implementation", "eager"], "elsewhere"),
        (["--load-in", "8bit"], "elsewhere"),
        (["--choices"], "--choices goes without --engine"),
        (["--projector", "p.safetensors"], "and not with --projector"),
    ],
)
def test_what_does_not_go_with_an_engine_is_said_at_the_door(world, words, told):
    record = dumps(questions(1)[0])
    result = call("vqa", world, "--engine", "http://127.0.0.1:9/v1", *words, stdin=record)
    assert isinstance(result.exception, UsageError)
    assert told in str(result.exception)


def test_what_is_no_address_is_refused(world):
    result = call("ask", world, "--engine", "somewhere", "What?")
    assert isinstance(result.exception, UsageError)


def test_without_an_engine_there_the_program_ends_in_one_line(world, start):
    server = start()
    server.close()
    code, told = cli.run(["ask", "-m", str(world.model), "--engine", server.url, "What?"])
    assert code == 1
    assert f"{server.url}: no connection" in told
    assert "\n" not in told

"""`vqa` over OpenAI's batch files: the real command, and lines that others can read."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from openai.types.chat import ChatCompletion

from chatbind_cli import cli
from chatbind_cli.errors import (
    ChatBindError,
    MediaError,
    RecordError,
    SomeRecordsFailed,
    UsageError,
)
from chatbind_cli.inference.batch_file import BatchLines
from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.questions import Question
from tests.inference.world import World, read_jsonl, write_jsonl

BATCH = ["--input-format", "openai-batch", "--output-format", "openai-batch"]


def words(world: World, *more: str | Path) -> list[str]:
    fixed = ["vqa", "-m", world.model, "--media-root", world.media, "--device", "cpu"]
    return [*map(str, fixed), "--max-new-tokens", "8", "--batch-size", "4", *map(str, more)]


def vqa(world: World, *more: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, words(world, *more), input=stdin)


def line(identity: Any, content: Any, **more: Any) -> dict[str, Any]:
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": content}], **more}
    return {"custom_id": identity, "method": "POST", "url": "/v1/chat/completions", "body": body}


def about(words: str, kind: str, url: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": words}, {"type": kind, kind: {"url": url}}]


def requests(world: World) -> list[dict[str, Any]]:
    """Twelve lines, of which the second, fifth and eighth fail."""
    picture = base64.b64encode((world.media / "2.png").read_bytes()).decode()
    tone = base64.b64encode((world.media / "tone.wav").read_bytes()).decode()
    heard = [{"type": "input_audio", "input_audio": {"data": tone, "format": "wav"}}]
    asked = [
        line("text", "What about the brown dog?"),
        line("no-file", about("What is this?", "image_url", "missing.png")),
        line("file", about("What is this?", "image_url", "1.png")),
        line("data", about("What is this?", "image_url", f"data:image/png;base64,{picture}")),
        line("tools", "Hi", tools=[{"type": "function"}]),
        line("sound", [{"type": "text", "text": "What is this?"}, *heard]),
        line("drawn", "What about the red car?", temperature=2.0, n=2, seed=3),
        line("embed", "Hi") | {"url": "/v1/embeddings"},
        line("short", "What about the bird?", max_tokens=2),
    ]
    return [*asked, *(line(f"more-{n}", f"What about the car {n}?") for n in range(3))]


FAILED = ["no-file", "tools", "embed"]


def completions(records: list[dict[str, Any]]) -> dict[str, ChatCompletion]:
    return {
        record["custom_id"]: ChatCompletion.model_validate(record["response"]["body"])
        for record in records
        if record["error"] is None
    }


def test_lines_are_answered_in_openais_form_whatever_model_they_name(
    world: World, tmp_path: Path
) -> None:
    asked = requests(world)
    asked[6]["body"]["logprobs"] = True
    path, out = write_jsonl(tmp_path / "b.jsonl", asked), tmp_path / "a.jsonl"
    result = vqa(world, "-q", path, "-o", out, *BATCH)
    assert isinstance(result.exception, SomeRecordsFailed)
    note = f"{path}:1: asks for gpt-4o-mini; model answers in its place"
    assert result.stderr.count("asks for") == 1 and note in result.stderr
    records = read_jsonl(out)
    assert [record["custom_id"] for record in records] == [a["custom_id"] for a in asked]
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        assert record.keys() == {"id", "custom_id", "response", "error"}
        assert (record["response"] is None) == (record["custom_id"] in FAILED)
    errors = {r["custom_id"]: r["error"] for r in records if r["error"] is not None}
    assert all(error["code"] == "invalid_request_error" for error in errors.values())
    assert "missing.png: no such file" in errors["no-file"]["message"]
    assert errors["tools"]["message"] == f"{path}:5: tools: cannot be a list here; leave it out"
    assert "asks for POST /v1/embeddings" in errors["embed"]["message"]
    told = completions(records)
    for identity, reply in told.items():
        assert reply.model == "model" and reply.usage is not None
        assert reply.usage.prompt_tokens > 10 and reply.usage.completion_tokens > 0, identity
    assert [choice.index for choice in told["drawn"].choices] == [0, 1]
    assert told["drawn"].choices[0].logprobs is not None
    assert told["short"].usage is not None and told["short"].usage.completion_tokens == 2


def test_answers_are_those_to_our_own_records(world: World, tmp_path: Path) -> None:
    asked = [
        {"question_id": "file", "text": "What is this?", "image": "1.png"},
        {"question_id": "data", "text": "What is this?", "image": "2.png"},
        {"question_id": "sound", "text": "What is this?", "audio": "tone.wav"},
        {"question_id": "text", "text": "What about the brown dog?"},
    ]
    path = write_jsonl(tmp_path / "q.jsonl", asked)
    assert vqa(world, "-q", path, "-o", tmp_path / "a.jsonl").exception is None
    own = {record["question_id"]: record["text"] for record in read_jsonl(tmp_path / "a.jsonl")}
    wanted = [a for a in requests(world) if a["custom_id"] in own]
    result = vqa(world, *BATCH, stdin="".join(json.dumps(a) + "\n" for a in wanted))
    assert result.exception is None
    records = [json.loads(text) for text in result.stdout.splitlines()]
    told = {i: reply.choices[0].message.content for i, reply in completions(records).items()}
    assert told == own and len(set(own.values())) > 2


def test_a_file_is_continued_by_custom_id_and_is_then_the_same(
    world: World, tmp_path: Path
) -> None:
    asked = requests(world)
    path, whole = write_jsonl(tmp_path / "b.jsonl", asked), tmp_path / "whole.jsonl"
    vqa(world, "-q", path, "-o", whole, *BATCH)
    written = whole.read_bytes().splitlines(keepends=True)
    for kept in (
        b"".join(written[:4]),
        b"".join(written[6:][::-1]),
        b"".join(written[:3]) + written[3][: len(written[3]) // 2],
    ):
        out = tmp_path / "a.jsonl"
        out.write_bytes(kept)
        result = vqa(world, "-q", path, "-o", out, *BATCH)
        assert isinstance(result.exception, SomeRecordsFailed)
        assert str(result.exception).startswith("3 of 12 questions failed")
        assert out.read_bytes() == whole.read_bytes()
    asked[1] = line("no-file", about("What is this?", "image_url", "3.png"))
    result = vqa(world, "-q", write_jsonl(path, asked), "-o", out, *BATCH)
    assert str(result.exception).startswith("2 of 12 questions failed")
    again = out.read_bytes().splitlines(keepends=True)
    assert again[0] == written[0] and again[2:] == written[2:]
    assert json.loads(again[1])["error"] is None


def test_lines_without_an_id_or_that_are_none_fail_in_their_place(
    world: World, tmp_path: Path
) -> None:
    good = line("a", "What about the dog?")
    texts = [
        json.dumps(good),
        '{"custom_id": "b", "body"',
        json.dumps({**good, "custom_id": None}),
        json.dumps({**good, "custom_id": "c", "body": "Hi"}),
        json.dumps(line("d", "Hi", stream=True)),
        json.dumps(good),
    ]
    path, out = tmp_path / "b.jsonl", tmp_path / "a.jsonl"
    path.write_text("\n".join(texts) + "\n")
    for _ in range(2):
        result = vqa(world, "-q", path, "-o", out, *BATCH)
        assert str(result.exception).startswith("5 of 6 questions failed")
        records = read_jsonl(out)
        assert [record["custom_id"] for record in records] == ["a", None, None, "c", "d"]
        assert [record.get("line") for record in records] == [None, 2, 3, None, None]
        said = [record["error"]["message"] for record in records[1:]]
        for number, (what, message) in enumerate(
            zip(
                ("is not JSON", "custom_id must be", "body must be", "stream: "), said, strict=True
            ),
            start=2,
        ):
            assert message.startswith(f"{path}:{number}: ") and what in message
    (tmp_path / "skipped.jsonl").touch()
    vqa(world, "-q", path, "-o", tmp_path / "skipped.jsonl", "--on-error", "skip", *BATCH)
    assert [record["custom_id"] for record in read_jsonl(tmp_path / "skipped.jsonl")] == ["a"]
    result = vqa(world, "-q", path, "-o", tmp_path / "f.jsonl", "--on-error", "fail", *BATCH)
    assert isinstance(result.exception, RecordError)


def test_what_others_have_written_is_neither_continued_nor_replaced(
    world: World, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "b.jsonl", requests(world)[:1])
    out = tmp_path / "a.jsonl"
    assert vqa(world, "-q", path, "-o", out, *BATCH).exception is None
    first = out.read_bytes()
    result = vqa(world, "-q", path, "-o", out, *BATCH, "--max-new-tokens", "9")
    assert "made by another model, or with other settings" in str(result.exception)
    result = vqa(world, "-q", path, "-o", out)
    assert isinstance(result.exception, RecordError)
    assert out.read_bytes() == first
    theirs = json.loads(first)
    theirs["response"]["body"]["system_fingerprint"] = "fp_44709d6fcb"
    write_jsonl(tmp_path / "theirs.jsonl", [theirs])
    (tmp_path / "asked.jsonl").write_bytes(path.read_bytes())
    for name in ("theirs.jsonl", "asked.jsonl"):
        before = (tmp_path / name).read_bytes()
        result = vqa(world, "-q", path, "-o", tmp_path / name, *BATCH)
        assert isinstance(result.exception, RecordError), name
        assert (tmp_path / name).read_bytes() == before
    result = vqa(world, "-q", path, "-o", tmp_path / "asked.jsonl", "--overwrite", *BATCH)
    assert isinstance(result.exception, ChatBindError)
    assert (tmp_path / "asked.jsonl").read_bytes() == path.read_bytes()
    assert vqa(world, "-q", path, "-o", out, "--overwrite", *BATCH).exception is None
    assert out.read_bytes() == first


def test_a_person_at_a_terminal_reads_words() -> None:
    form = BatchLines("m", {})
    asked = Question(id="a")
    said = form.in_words(form.answer(asked, Generated("A dog.", 2, "stop")))
    assert said == "a\n    A dog."
    assert "error: is broken" in form.in_words(form.failure(asked, MediaError("is broken")))


def test_what_does_not_go_together_is_refused_at_the_door(world: World) -> None:
    for more in (BATCH[2:], [*BATCH, "--choices"]):
        assert isinstance(vqa(world, *more, stdin="").exception, UsageError)

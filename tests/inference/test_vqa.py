"""`chatbind vqa`: the real command, in this process and in processes of its own."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from click.testing import CliRunner, Result

from chatbind_cli import cli
from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.encoders.imagebind.preprocess import load_media
from chatbind_cli.encoders.imagebind.weights import WEIGHTS_NAME
from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.errors import ChatBindError, CheckpointError, SomeRecordsFailed, UsageError
from chatbind_cli.files import sha256_file
from chatbind_cli.jsonl import dumps
from tests.inference.world import (
    World,
    questions,
    read_jsonl,
    save_tiny_encoder,
    start,
    write_jsonl,
)


def words(world: World, *more: str | Path) -> list[str]:
    fixed = ["vqa", "-m", world.model, "--media-root", world.media, "--device", "cpu"]
    return [*map(str, fixed), "--max-new-tokens", "8", "--batch-size", "4", *map(str, more)]


def vqa(world: World, *more: str | Path, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli.app, words(world, *more), input=stdin)


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(dumps(record) + "\n" for record in records)


def test_questions_on_stdin_are_answered_on_stdout(world: World) -> None:
    asked = questions(6)
    result = vqa(world, stdin=lines(asked))
    assert result.exception is None
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["question_id"] for record in records] == list(range(6))
    assert all(record["text"] for record in records)
    assert records[0].keys() == {
        "question_id",
        "prompt",
        "text",
        "answer_id",
        "model_id",
        "metadata",
        "category",
        "image",
    }
    assert records[0]["model_id"] == "model"
    unknown = {"model_sha256": "", "encoder_config_sha256": ""}
    assert records[0]["metadata"] | unknown == {
        **unknown,
        "n_tokens": 8,
        "finish_reason": "length",
        "prompt_style": "vicuna_v1_1",
        "max_new_tokens": 8,
        "temperature": 0.0,
        "dtype": "float32",
    }


def test_the_seeds_spellings_work(world: World, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", questions(2))
    out = tmp_path / "a.jsonl"
    line = ["vqa", "--model_name", world.model, "--question-file", path, "--device", "cpu"]
    line += ["--image-folder", world.media, "--answers-file", out, "--max_new_tokens", "4"]
    line += ["--vision_tower", "openai/clip-vit-large-patch14"]
    done = CliRunner().invoke(cli.app, [str(word) for word in line])
    assert done.exception is None
    assert "--vision-tower has no effect: --encoder names the encoder" in done.stderr
    assert len(read_jsonl(out)) == 2
    line[2] = world.llama
    line += ["--mm-projector", world.projector, "--overwrite", "--encoder", world.encoder]
    done = CliRunner().invoke(cli.app, [str(word) for word in line])
    assert done.exception is None
    assert read_jsonl(out)[0]["model_id"] == "llama+projector"


def test_failed_questions_become_records_and_exit_code_3(world: World, tmp_path: Path) -> None:
    asked = questions(5)
    asked[1]["image"] = "../secret.png"
    asked[2] = {"question_id": 2, "text": "?", "audio": "0.png"}
    path, out = write_jsonl(tmp_path / "q.jsonl", asked), tmp_path / "a.jsonl"
    code, message = cli.run(words(world, "-q", path, "-o", out))
    assert code == 3
    assert message.startswith("chatbind: error: 2 of 5 questions failed; the first: ../secret.png")
    records = read_jsonl(out)
    assert [record["question_id"] for record in records] == [0, 1, 2, 3, 4]
    assert ["error" in record for record in records] == [False, True, True, False, False]
    assert "leaves the media root" in records[1]["error"]
    asked[1]["image"], asked[2]["audio"] = "1.png", "tone.wav"
    write_jsonl(path, asked)
    assert vqa(world, "-q", path, "-o", out).exception is None
    whole = tmp_path / "whole.jsonl"
    assert vqa(world, "-q", path, "-o", whole).exception is None
    assert out.read_bytes() == whole.read_bytes()


def test_other_settings_do_not_continue_a_file(world: World, tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "q.jsonl", questions(2)), tmp_path / "a.jsonl"
    vqa(world, "-q", path, "-o", out)
    result = vqa(world, "-q", path, "-o", out, "--temperature", "0.5")
    assert isinstance(result.exception, ChatBindError)
    assert "made with temperature 0.0, this run has 0.5" in str(result.exception)
    assert (
        vqa(world, "-q", path, "-o", out, "--temperature", "0.5", "--overwrite").exception is None
    )


def test_media_are_read_as_in_training_unless_an_option_says_otherwise(world: World) -> None:
    asked = lines([{"question_id": 1, "text": "What is this?", "depth": "depth.png"}])
    plain, changed = vqa(world, stdin=asked), vqa(world, "--depth-unit", "m", stdin=asked)
    assert "media_options" not in plain.stdout
    record = json.loads(changed.stdout)
    assert record["metadata"]["media_options"] == {"depth_unit": "m"}
    assert record["text"] != json.loads(plain.stdout)["text"]


def test_answers_with_another_encoder_say_so(world: World, tmp_path: Path) -> None:
    save_tiny_encoder(tmp_path / "other", seed=9)
    asked = lines(questions(1))
    refused = vqa(world, "--encoder", tmp_path / "other", stdin=asked)
    assert "--allow-encoder-mismatch" in str(refused.exception)
    taken = vqa(world, "--encoder", tmp_path / "other", "--allow-encoder-mismatch", stdin=asked)
    wanted = sha256_file(tmp_path / "other" / WEIGHTS_NAME)
    assert json.loads(taken.stdout)["metadata"]["encoder_sha256"] == wanted


def test_sampled_answers_can_be_continued_too(world: World, tmp_path: Path) -> None:
    asked = [{"question_id": index, "text": "Describe a bird."} for index in range(8)]
    path, whole = write_jsonl(tmp_path / "q.jsonl", asked), tmp_path / "whole.jsonl"
    options = ["--temperature", "0.8", "--seed", "3", "-q", str(path), "-o"]
    vqa(world, *options, whole)
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:6]))
    vqa(world, *options, cut)
    texts = [record["text"] for record in read_jsonl(whole)]
    assert len(set(texts)) > 1
    assert cut.read_bytes() == whole.read_bytes()


def test_the_model_may_come_from_the_stage_before(world: World, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", questions(2))
    made = dumps({"artifact": "model", "path": str(world.model), "made_by": "finetune"}) + "\n"
    line = ["vqa", "-m", "-", "-q", path, "--media-root", world.media, "--device", "cpu"]
    line = [*map(str, line), "--max-new-tokens", "2"]
    piped = CliRunner().invoke(cli.app, line, input='{"step": 1}\n' + made)
    assert len(piped.stdout.splitlines()) == 2
    ended = CliRunner().invoke(cli.app, line, input='{"step": 1}\n')
    assert isinstance(ended.exception, CheckpointError)
    assert "the stage before it in the pipe did not finish" in str(ended.exception)


def test_model_and_questions_cannot_share_standard_input() -> None:
    result = CliRunner().invoke(cli.app, ["vqa", "-m", "-"], input="")
    assert isinstance(result.exception, UsageError)


def test_a_store_takes_the_place_of_media_and_encoder(world: World, tmp_path: Path) -> None:
    asked = [record for record in questions(8) if "image" in record]
    encoder = open_encoder(world.encoder)
    sha256 = sha256_file(world.encoder / WEIGHTS_NAME)
    options = {"encoder_sha256": sha256, "dim": 8, "dtype": "float32"}
    # as a training run keeps them
    with EmbeddingStore.open(tmp_path / "store" / "part-00000", "a", **options) as store:
        for name in {record["image"] for record in asked}:
            media = load_media(world.media / name)
            [row] = encoder.embed([media], normalize=False)
            store.add(name, "image", media.source.sha256, "image/v1", row)
    path = write_jsonl(tmp_path / "q.jsonl", asked)
    direct = vqa(world, "-q", path)
    stored = vqa(world, "-q", path, "--store", tmp_path / "store", "--encoder", world.media)
    texts = [[json.loads(line)["text"] for line in r.stdout.splitlines()] for r in (direct, stored)]
    assert texts[0] == texts[1]
    assert len(texts[0]) == len(asked)
    with EmbeddingStore.open(tmp_path / "other", "a", **options) as store:
        store.add("x.wav", "audio", "1" * 64, "audio/v1/2/2.0/imagebind", torch.ones(8))
        store.add("0.png", "image", "2" * 64, "image/v1", torch.ones(8))
    asked = [{"question_id": 1, "text": "?", "audio": "x.wav"}, {"question_id": 2, "text": "?"}]
    question = lines(asked)
    refused = vqa(world, "--store", tmp_path / "other", stdin=question)
    assert isinstance(refused.exception, SomeRecordsFailed)
    [first, second] = [json.loads(line) for line in refused.stdout.splitlines()]
    assert "not as the model takes it (audio/v1/3/2.0/imagebind)" in first["error"]
    assert second["text"]
    taken = vqa(world, "--store", tmp_path / "other", "--audio-clips", "2", stdin=question)
    assert taken.exception is None


def test_a_missing_encoder_ends_the_run_unless_no_question_needs_one(world: World) -> None:
    needs = vqa(world, "--encoder", world.media, stdin=lines(questions(1)))
    assert isinstance(needs.exception, ChatBindError)
    assert str(world.media) in str(needs.exception)
    text = {"question_id": 1, "text": "Describe a bird."}
    assert vqa(world, "--encoder", world.media, stdin=lines([text])).exception is None


def test_a_broken_line_is_a_failed_record_or_ends_the_run(world: World, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "?"}\n{"question_id"')
    result = vqa(world, "-q", tmp_path / "q.jsonl")
    answer, failed = map(json.loads, result.stdout.splitlines())
    assert (answer["question_id"], failed["line"]) == (1, 2)
    assert "q.jsonl:2: is not JSON" in failed["error"]
    assert isinstance(result.exception, SomeRecordsFailed)
    result = vqa(world, "-q", tmp_path / "q.jsonl", "--on-error", "fail")
    assert len(result.stdout.splitlines()) == 1
    assert "q.jsonl:2: is not JSON" in str(result.exception)
    assert not isinstance(result.exception, SomeRecordsFailed)


# ------------------------------------------------------------ processes of their own


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.005)
    pytest.fail(f"ended too early: {process.communicate()}")


@pytest.mark.slow
def test_kill_9_at_random_moments_leaves_a_file_that_continues_to_the_same_bytes(
    world: World, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", questions(80))
    whole, out = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    assert vqa(world, "-q", path, "-o", whole).exception is None
    drawn = random.Random(time.time_ns())
    counts = []
    for _ in range(2):
        there = out.read_bytes().count(b"\n") if out.exists() else 0
        process = start(*words(world, "-q", path, "-o", out))
        wait_for_lines(out, there + drawn.randint(1, 9), process)
        time.sleep(drawn.uniform(0, 0.05))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.communicate()
        counts.append(out.read_bytes().count(b"\n"))
        # what is there is part of what is to come
        there = set(out.read_bytes().splitlines(keepends=True))
        assert {line for line in there if line.endswith(b"\n")} <= set(
            whole.read_bytes().splitlines(keepends=True)
        )
    assert counts == sorted(set(counts))
    assert vqa(world, "-q", path, "-o", out).exception is None
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_a_pipe_that_pauses_is_answered_at_once_and_ctrl_c_ends_with_130(world: World) -> None:
    process = start(*words(world, "--batch-size", "16"), stdin=subprocess.PIPE)
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None
    for asked in questions(3):
        stdin.write((dumps(asked) + "\n").encode())
        stdin.flush()
        assert json.loads(stdout.readline())["question_id"] == asked["question_id"]
    process.send_signal(signal.SIGINT)
    rest, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest == b""
    assert stderr.decode().splitlines() == ["chatbind: interrupted"]


@pytest.mark.slow
def test_a_closed_pipe_ends_the_run_and_its_workers_quietly(world: World, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", questions(400))
    process = start(*words(world, "-q", path, "--num-processes", "2"))
    stdout: IO[bytes] | None = process.stdout
    assert stdout is not None
    assert json.loads(stdout.readline())["question_id"] == 0
    stdout.close()
    assert process.wait(timeout=120) == 141
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()


def test_help_and_leaders_load_nothing_heavy() -> None:
    code = (
        "import sys; from chatbind_cli import cli; cli.run(['vqa', '--help']);"
        "cli.run(['ask', '--help']); cli.run(['ask']);"
        "import chatbind_cli.inference.vqa;"  # as a leader has it
        "sys.exit(str({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "set()"

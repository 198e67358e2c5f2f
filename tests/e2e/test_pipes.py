"""Commands joined by pipes: whole, cut short by the reader, interrupted by the user."""

from __future__ import annotations

import json
import signal
import subprocess
import time

import pytest

TRAINING = "-m llama --encoder imagebind --media-root media"
QUESTIONS = "eval/questions-image.jsonl"

pytestmark = pytest.mark.slow


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def test_one_question_goes_through_vqa_review_and_summarize(shell, warm):
    done = shell(
        "printf '%s\\n' \"$(head -n 1 eval/questions-image.jsonl)\""
        " | chatbind vqa -m model --media-root media --max-new-tokens 8"
        " | chatbind review --question eval/questions-image.jsonl --judge rule"
        "   --answer-list eval/answers-reference-image.jsonl -"
        " | chatbind summarize --json",
        check=False,
        env=warm,
    )
    summary = records(done.stdout)
    assert summary[-1]["category"] == "all"
    assert summary[-1]["n"] == 1
    assert "Traceback" not in done.stderr


def test_every_stage_hands_its_artefact_to_the_next(shell, warm):
    done = shell(
        f"chatbind pretrain {TRAINING} --data train/captions.json -o s1"
        " | chatbind extract-projector - -o p.safetensors"
        f" | chatbind finetune {TRAINING} --data train/instructions.json --projector - -o s2"
        " | chatbind vqa -m - -q eval/questions-image.jsonl --media-root media --max-new-tokens 8",
        env=warm,
    )
    questions = records((shell.folder / QUESTIONS).read_text())
    answers = records(done.stdout)
    assert [a["question_id"] for a in answers] == [q["question_id"] for q in questions]


def test_a_stage_whose_input_never_finished_says_so(shell):
    done = shell("false | chatbind extract-projector - -o p.safetensors", check=False)
    assert done.returncode == 1
    assert "did not finish" in done.stderr
    assert not (shell.folder / "p.safetensors").exists()


def test_a_reader_that_goes_away_ends_the_program_quietly(shell, warm):
    done = shell(
        "for i in 1 2; do sed s/image-/image-$i-/ eval/questions-image.jsonl; done > many.jsonl;"
        "chatbind vqa -m model -q many.jsonl --media-root media --max-new-tokens 8"
        " --batch-size 1 | head -n 1; echo ${PIPESTATUS[0]} >&2",
        check=False,
        env=warm,
    )
    assert len(records(done.stdout)) == 1
    assert done.stderr.splitlines()[-1] in ("0", "141")
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_with_130_and_leaves_whole_records_that_a_second_run_continues(shell, warm):
    shell(f"for i in $(seq 6); do sed s/image-/image-$i-/ {QUESTIONS}; done > many.jsonl")
    line = "chatbind vqa -m model -q many.jsonl --media-root media --max-new-tokens 8"
    output = shell.folder / "many-answers.jsonl"
    process = subprocess.Popen(
        [*line.split(), "-o", str(output), "--batch-size", "2"],
        cwd=shell.folder,
        env=warm,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        executable=warm["PATH"].split(":")[0] + "/chatbind",
    )
    deadline = time.monotonic() + 120
    while not (output.exists() and output.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate()[1]
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "chatbind: interrupted"
    left = output.read_text()
    assert left.endswith("\n")
    assert 2 <= len(records(left)) < 90
    shell(
        f"{line} -o again.jsonl --batch-size 2; {line} -o many-answers.jsonl --batch-size 2",
        env=warm,
    )
    assert output.read_bytes() == (shell.folder / "again.jsonl").read_bytes()

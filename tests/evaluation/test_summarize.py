"""`chatbind summarize` as a person or a script runs it, in the process of the tests."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from chatbind_cli import cli

FIGURES = [
    *("category", "n", "mean_1", "mean_2", "relative", "ci95"),
    *("win", "tie", "lose", "consistency", "failed"),
]
RULE = ["review", "--question", "q.jsonl", "--judge", "rule", "--answer-list", "ref.jsonl"]


class Done(NamedTuple):
    """What a call left."""

    code: int
    stdout: str
    stderr: str


Chatbind = Callable[..., Done]


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four questions about two modalities, right answers, and a model that is half right."""
    questions, right, said = [], [], []
    for i in range(4):
        medium = {
            "image" if i < 2 else "audio": f"{i}.x",
            "category": "conv" if i < 3 else "detail",
        }
        answer = f"The digit is {i}."
        questions.append(
            {"question_id": i, "text": f"Which digit {i}?", "answer": answer, **medium}
        )
        right.append({"question_id": i, "text": answer, "model_id": "reference"})
        text = f"The digit is {i if i % 2 == 0 else 9}."
        said.append({"question_id": i, "text": text, "model_id": "toy"})
    for name, records in (("q", questions), ("ref", right), ("said", said)):
        _write(tmp_path / f"{name}.jsonl", records)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def chatbind(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Chatbind:
    """Runs a command line."""

    def run(*words: object, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        code, message = cli.run([str(word) for word in words])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err + message)

    return run


def _records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_prints_the_figures_alone_and_all_comes_last(world: Path, chatbind: Chatbind) -> None:
    assert chatbind(*RULE, "said.jsonl", "-o", "r.jsonl").code == 0
    one = _records(chatbind("summarize", "r.jsonl", "--json").stdout)
    assert [row["category"] for row in one] == ["conv", "detail", "all"]
    assert all(list(row) == FIGURES for row in one)
    two = _records(chatbind("summarize", "r.jsonl", "r.jsonl", "--json").stdout)
    assert all(list(row) == ["review", *FIGURES] for row in two)
    words = ["summarize", "r.jsonl", "--baseline", "r.jsonl", "--json"]
    (row, *_) = _records(chatbind(*words).stdout)
    assert list(row) == [*FIGURES, "baseline", "n_both", "difference", "difference_ci95", "p_value"]


def test_a_table_is_headed_by_what_makes_its_lines(world: Path, chatbind: Chatbind) -> None:
    assert chatbind(*RULE, "said.jsonl", "-o", "r.jsonl").code == 0
    for by, line in (("modality", "| audio | 2 |"), ("judge", "| rule | 4 |")):
        done = chatbind("summarize", "r.jsonl", "--by", by, "--format", "markdown")
        assert done.stdout.startswith(f"| {by} | n |")
        assert line in done.stdout


def test_what_files_say_cannot_command_the_terminal(world: Path, chatbind: Chatbind) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J"
    reviews = [{"question_id": 1, "category": f"a{evil}", "tuple": [8, 7], "reviewer_id": evil}]
    reviews.append({"question_id": 2, "tuple": None, "error": f"it {evil} failed"})
    (world / "r.jsonl").write_text("".join(json.dumps(review) + "\n" for review in reviews))
    for form in ("table", "markdown"):
        done = chatbind("summarize", "r.jsonl", "--format", form)
        assert done.code == 0
        assert "\x1b" not in done.stdout + done.stderr
        assert "\x07" not in done.stdout + done.stderr


def test_two_runs_are_compared_on_the_command_line(world: Path, chatbind: Chatbind) -> None:
    assert chatbind(*RULE, "said.jsonl", "-o", "old.jsonl").code == 0
    assert chatbind(*RULE, "ref.jsonl", "-o", "new.jsonl").code == 0
    done = chatbind("summarize", "new.jsonl", "--baseline", "old.jsonl")
    row = _records(done.stdout)[-1]
    assert (row["baseline"], row["n_both"], row["difference"]) == ("old", 4, 45.0)
    assert row["p_value"] == 0.5  # two of four questions differ: 8 of 16 exchanges are as extreme
    assert "not distinguishable" in done.stderr
    assert "p of the 2 lines above all: corrected for testing 2 (Holm)" in done.stderr
    assert [row["p_value"] for row in _records(done.stdout)] == [1.0, 1.0, 0.5]


def test_summarize_reads_the_review_files_of_a_folder(world: Path, chatbind: Chatbind) -> None:
    done = chatbind(*RULE, "said.jsonl", "-o", "review/review_toy.jsonl")
    assert done.code == 0
    done = chatbind(*RULE, "ref.jsonl", "-o", "review/gpt4_text_same.jsonl")
    assert done.code == 0
    done = chatbind("summarize", "-d", "review", "-i", "1", "3")
    rows = _records(done.stdout)
    assert {(r["review"], r["n"], r["relative"]) for r in rows if r["category"] == "all"} == {
        ("toy", 2, 100.0),
        ("same", 2, 100.0),
    }
    words = ["-i", "1", "3", "review/review_toy.jsonl", "--names", "left", "right"]
    listed = chatbind("summarize", *words, "--format", "markdown")
    assert "| all | 2 |" in listed.stdout
    assert "first: left, second: right" in listed.stdout
    done = chatbind("summarize", *words, "middle")
    assert done.code == 2
    assert "--names needs 2 names here, not 3" in done.stderr
    done = chatbind("summarize", "-i", "1", "nowhere.jsonl")
    assert (done.code, "nowhere.jsonl: No such file" in done.stderr) == (1, True)
    named = chatbind(
        "summarize", "-f", "review/review_toy.jsonl", "--by", "modality", "--format", "markdown",
            )  # fmt: skip
    share = "100.0 % / 50.0 %"
    line = f"| image | 2 | {share} | {share} | 100.0 % / 83.3 % | 10 | 5.5 | 55.0 |"
    assert line in named.stdout
    assert "| audio | 2 |" in named.stdout
    table = chatbind("summarize", "review/review_toy.jsonl", "--format", "table")
    assert "judge: rule" in table.stdout
    assert "100.0 % / 50.0 %" in table.stdout


def test_all_models_are_ranked_and_held_against_people_and_length(
    world: Path, chatbind: Chatbind
) -> None:
    words = ["--orders", "both", "--pairs", "all", "-o", "r.jsonl"]
    assert chatbind(*RULE, "said.jsonl", "ref.jsonl", *words).code == 0
    labels = [{"question_id": 1, "winner": "reference", "models": ["reference", "toy"]}]
    _write(world / "human.jsonl", [*labels, {"question_id": 7, "winner": 1}])
    words = ["summarize", "r.jsonl", "--labels", "human.jsonl", "--length-controlled"]
    table = chatbind(*words, "--format", "markdown")
    assert table.code == 0, table.stderr
    assert "| ranking by bradley-terry | points |" in table.stdout
    assert "human.jsonl: no winner, or not said of which models: question 7" in table.stderr
    assert "| 1 | 100.0 % |" in table.stdout
    plain = _records(chatbind(*words).stdout)
    assert not any("ranking" in row for row in plain), "a script gets it where it asks"
    rows = _records(chatbind(*words, "--ranking").stdout)
    assert rows[: len(plain)] == plain
    assert [row["place"] for row in rows[len(plain) :]] == [1, 2, 3]
    assert {row["lc_n"] for row in rows if row.get("category") == "all"} == {4}
    lines = chatbind(*words, "--format", "csv").stdout.splitlines()
    assert len(lines) == 1 + len(plain)
    assert chatbind(*words, "--format", "csv", "--ranking").stdout.startswith("ranking,group,")


def test_single_scores_have_a_ranking_and_no_baseline(world: Path, chatbind: Chatbind) -> None:
    assert chatbind(*RULE, "said.jsonl", "--mode", "single", "-o", "r.jsonl").code == 0
    table = chatbind("summarize", "r.jsonl", "--length-controlled", "--format", "markdown")
    assert "| 1. reference | 10 |" in table.stdout
    assert "| 2. toy | 5.5 |" in table.stdout
    assert "how long" not in table.stdout
    done = chatbind("summarize", "r.jsonl", "--baseline", "r.jsonl")
    assert (done.code, "single scores have no baseline" in done.stderr) == (2, True)
    page = chatbind("summarize", "r.jsonl", "--html", "report.html")
    assert page.code == 0, page.stderr


def test_a_report_is_written_beside_the_figures(world: Path, chatbind: Chatbind) -> None:
    done = chatbind(*RULE, "said.jsonl", "-o", "r.jsonl")
    words = ["--html", "out/report.html", "-q", "q.jsonl", "--answers", "ref.jsonl", "said.jsonl"]
    done = chatbind("summarize", "r.jsonl", *words)
    assert done.code == 0, done.stderr
    assert len(_records(done.stdout)) == 3
    page = (world / "out" / "report.html").read_text()
    assert page.count("<details") == 4
    assert "Which digit 3?" in page
    assert page.count("The digit is 9.") == 2
    assert page.count("what counts as right") == 4, "the questions carry it"

    _write(world / "c.jsonl", [{"audio": "2.x", "captions": ["Three beeps."]}, {"captions": []}])
    _write(world / "right.jsonl", [{"question_id": 0, "text": "It is a nought."}])
    words += ["--context", "c.jsonl", "--reference", "right.jsonl"]
    done = chatbind("summarize", "r.jsonl", *words)
    page = (world / "out" / "report.html").read_text()
    assert page.count("what counts as right") == page.count("It is a nought.") == 1
    assert page.count("Three beeps.") == 1
    assert "c.jsonl: cannot be used: line 2: a context names no media" in done.stderr
    refused = chatbind("summarize", "r.jsonl", "--html", "c.jsonl", "--context", "c.jsonl")
    assert refused.code == 2


@pytest.mark.parametrize(
    ("words", "stdin", "code", "message"),
    [
        ([], "", 1, "<stdin>: holds no reviews"),
        ([], "nonsense\n", 1, "<stdin>:1: is not JSON"),
        (["nowhere.jsonl"], "", 1, "nowhere.jsonl: No such file or directory"),
        (["-d", "."], "", 2, "no file named"),
        ([], '{"question_id": 1, "error": "x"}\n', 1, "every review failed"),
    ],
)
def test_nothing_to_summarize_is_said_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chatbind: Chatbind,
    words: list[str],
    stdin: str,
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = chatbind("summarize", *words, stdin=stdin)
    assert done.code == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_lines_that_are_no_reviews_are_counted_and_the_others_are_summarized(
    world: Path, chatbind: Chatbind
) -> None:
    good = {
        "question_id": 1,
        "category": "conv",
        "tuple": [8, 6],
        "metadata": {"models": ["a", "b"]},
    }
    lines = [json.dumps(good), "not json", '{"category": "conv", "tuple": [NaN, 1]}', "[1]", '"x"']
    text = "\n".join([*lines, json.dumps({**good, "tuple": [1e308, 1]}), "\ufeff"])
    (world / "r.jsonl").write_bytes(text.encode() + b"\n\xff\n")
    done = chatbind("summarize", "r.jsonl", "--format", "json")
    assert done.code == 3, done.stderr
    assert "Traceback" not in done.stderr
    rows = {row["category"]: row for row in _records(done.stdout)}
    assert (rows["all"]["n"], rows["all"]["relative"]) == (1, 75.0)
    assert rows["all"]["failed"] >= 6
    assert rows["conv"]["failed"] >= 1
    assert "r.jsonl:2: is not JSON" in done.stderr

"""Progress beside records: on a terminal, in a file, in a pipe."""

import json
import re
import subprocess
import sys

from chatbind_cli.console import Progress, note, printable
from tests.terminal import on_a_terminal

WORK = """
import time
from chatbind_cli.artifacts import emit_record
from chatbind_cli.console import Progress, note
from chatbind_cli.jsonl import RecordWriter
with RecordWriter("-", key="n") as writer, Progress(3, "counting", "numbers") as progress:
    for n in range(3):
        writer.write({"n": n})
        emit_record({"n": 10 + n, "text": "wider than the terminal " * 20})
        note(f"saw {n}")
        time.sleep(0.15)
        progress.advance()
    with progress.beside(None, "below") as below:
        below.expect_bytes(2 << 20)
        below.advance_bytes(2 << 20)
        time.sleep(0.15)
"""
LONG = "wider than the terminal " * 20
RECORDS = [r for n in range(3) for r in ({"n": n}, {"n": 10 + n, "text": LONG})]


def work_on_a_terminal(stdout=None):
    code, shown = on_a_terminal([sys.executable, "-c", WORK], stdout)
    assert code == 0
    return shown


def test_what_is_meant_for_a_file_gets_there_whatever_is_on_the_terminal(tmp_path):
    with (tmp_path / "out.jsonl").open("wb") as file:
        shown = work_on_a_terminal(file)
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == RECORDS
    assert b"counting" in shown and b"below" in shown
    assert b"saw 2" in shown
    assert b'{"n"' not in shown


def test_on_one_terminal_records_stand_on_lines_of_their_own():
    # What stays on a line is what comes after the last time that it was erased.
    lines = [re.split(rb"\x1b\[2K|\r", line)[-1] for line in work_on_a_terminal().split(b"\r\n")]
    assert [json.loads(line) for line in lines if line.startswith(b"{")] == RECORDS
    assert not any(b"{" in line for line in lines if not line.startswith(b"{"))


def test_what_a_terminal_would_obey_is_left_out():
    evil = "a\x1b]0;title\x07b\x1b[2Jc\u202ed\ne\tf"
    assert printable(evil) == "a]0;titleb[2Jcd\ne\tf"
    done = subprocess.run(
        [sys.executable, "-m", "chatbind_cli", "summarize", "no\x1b[31mfile"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "file" in done.stderr and "\x1b" not in done.stderr


def test_without_a_terminal_there_is_no_bar():
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True)
    assert [json.loads(line) for line in done.stdout.splitlines()] == RECORDS
    assert done.stderr.splitlines() == [f"chatbind: saw {n}" for n in range(3)]


def test_without_a_terminal_a_line_comes_every_ten_seconds(monkeypatch, capsys):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr("chatbind_cli.console.time.monotonic", lambda: next(clock))
    with Progress(40, "counting", "MiB") as progress:
        for _ in range(5):
            progress.advance_bytes(3 << 19)
    with Progress(None, "counting") as progress:
        for _ in range(5):
            progress.advance(2)
    assert capsys.readouterr().err.splitlines() == [
        "chatbind: counting: 4/40 MiB",
        "chatbind: counting: 6 items",
    ]


def test_quiet_and_workers_other_than_the_first_say_nothing(monkeypatch, capsys):
    for name, value in (("CHATBIND_QUIET", "1"), ("RANK", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            note("hello")
    assert capsys.readouterr().err == ""
    note("hello")
    assert capsys.readouterr().err == "chatbind: hello\n"

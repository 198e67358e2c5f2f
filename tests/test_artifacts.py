"""How a stage names what it made, and how the next one finds it."""

from __future__ import annotations

import io
import json

import pytest

from chatbind_cli.artifacts import artifact_record, emit_artifact, resolve_artifact
from chatbind_cli.errors import CheckpointError
from chatbind_cli.jsonl import dumps


@pytest.fixture
def piped(monkeypatch):
    """Has records come from the stage before."""

    def pipe(*records):
        text = "".join(dumps(record) + "\n" for record in records)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    return pipe


def test_a_path_is_a_path():
    assert str(resolve_artifact("a/b", {"projector"})) == "a/b"


def test_the_artefact_record_ends_a_stream_of_log_records(piped, tmp_path):
    made = artifact_record("checkpoint", tmp_path, made_by="pretrain")
    piped({"step": 1, "loss": 2.0}, made)
    assert resolve_artifact("-", {"checkpoint"}) == tmp_path


@pytest.mark.parametrize("records", [[], [{"step": 1}], [{"artifact": "store", "path": "/"}]])
def test_an_end_without_one_says_that_the_stage_before_did_not_finish(piped, records):
    piped(*records)
    with pytest.raises(CheckpointError, match="did not finish"):
        resolve_artifact("-", {"checkpoint"})


def test_a_path_that_is_gone_is_named(piped, tmp_path):
    made = artifact_record("checkpoint", tmp_path / "gone", made_by="pretrain")
    piped(made)
    with pytest.raises(CheckpointError, match=r"gone: .*not there"):
        resolve_artifact("-", {"checkpoint"})


def test_a_person_reads_words_and_a_pipe_gets_the_record(tmp_path, capsys, monkeypatch):
    made = artifact_record("projector", tmp_path, made_by="pretrain", sha256="ab" * 32)
    emit_artifact(made)
    assert json.loads(capsys.readouterr().out) == made
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    emit_artifact(made)
    assert capsys.readouterr().out == f"projector: {tmp_path}  (SHA-256 abababababab...)\n"

"""Parquet files as training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatbind_cli.data import parquet_records
from chatbind_cli.data.checked import checked_file
from chatbind_cli.data.conversations import Conversations
from chatbind_cli.errors import RecordError


def talk(number: int, question: str = "<image>\nWhat?", **keys: Any) -> dict[str, Any]:
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": f"A {number}."}]
    return {"id": f"r{number}", "conversations": said, **keys}


def write(path: Path, records: list[dict[str, Any]], **how: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(records), path, **how)
    return path


def test_rows_are_what_the_same_records_in_json_are(tmp_path: Path) -> None:
    records = [
        talk(0, image="a.jpg", score=0.5),
        talk(1, "Hi", audio=None),
        talk(2, "<audio> or <audio>?", audio=["x.wav", "y.wav"]),
        {"id": "bad", "conversations": None},
        {"instruction": "Add.", "input": "1 2", "output": "3"},
    ]
    keys = list(dict.fromkeys(key for record in records for key in record))
    rows = [{key: record.get(key) for key in keys} for record in records]
    path = write(tmp_path / "data.bin", rows, row_group_size=2)
    lines = tmp_path / "data.json"
    lines.write_text(json.dumps([{k: v for k, v in r.items() if v is not None} for r in records]))
    found, same = checked_file(path), checked_file(lines)
    turns = [[c.turns for c in Conversations.of_files([file])] for file in (found, same)]
    assert turns[0] == turns[1]
    assert [len(found), len(found.good)] == [5, 4]
    assert found.errors() == [
        {key: text.replace(str(lines), str(path)) for key, text in same.errors()[0].items()}
    ]
    assert [c.where for c in Conversations.of_files([found])][-1] == f"{path}[4]"


def test_more_rows_than_are_read_at_once_have_their_places(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [talk(n, image="a.jpg") for n in range(600)])
    found = Conversations.of_files([checked_file(path)])
    assert [(c.id, c.where) for c in found] == [(f"r{n}", f"{path}[{n}]") for n in range(600)]


def test_pictures_in_place_of_names_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a", [talk(0, image={"bytes": b"x", "path": "a.jpg"})])
    with pytest.raises(RecordError, match="a: its column image holds struct.*, not file names"):
        checked_file(path)


def test_a_row_group_that_would_take_too_much_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(parquet_records, "_MOST_BYTES", 10_000)
    pixels = "x" * 100_000  # of a column that is not read
    path = write(tmp_path / "a", [talk(n, "Hi", pixels=pixels + str(n)) for n in range(3)])
    assert len(checked_file(path).good) == 3
    long = "x" * 100_000
    path = write(tmp_path / "b", [talk(n, long + str(n)) for n in range(3)], compression="zstd")
    with pytest.raises(RecordError, match="b: its row group 0 takes 0.0 GiB; write it anew"):
        checked_file(path)


@pytest.mark.parametrize("at", [8, 200, -12])
def test_a_broken_file_is_one_line(tmp_path: Path, at: int) -> None:
    path = write(tmp_path / "a", [talk(n, image="a.jpg") for n in range(3)])
    content = bytearray(path.read_bytes())
    content[at : at + 8] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(RecordError, match="a: is not readable as Parquet"):
        checked_file(path)
    path.write_bytes(content[:50])
    with pytest.raises(RecordError, match="a: is not readable as Parquet"):
        checked_file(path)

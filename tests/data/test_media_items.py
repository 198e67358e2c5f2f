"""What there is to encode: words, lines, records, training files."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from chatbind_cli.data.media_items import (
    items_of_list,
    items_of_paths,
    items_of_training_file,
)
from chatbind_cli.errors import MediaError, RecordError
from chatbind_cli.media.root import MediaRoot


def listed(text: str, root: Path | None = None, modality: str | None = None) -> list[object]:
    stream = io.BufferedReader(io.BytesIO(text.encode()))  # type: ignore[arg-type]
    return list(items_of_list("-", MediaRoot(root), modality, stdin=stream))


def test_lines_are_paths_with_any_characters_but_an_end_of_line() -> None:
    items = listed("a.jpg\r\n\n b c.wav\nhttps://example.org/x.png\n你.png")
    assert [item.path for item in items] == [
        "a.jpg",
        " b c.wav",
        "https://example.org/x.png",
        "你.png",
    ]
    assert all(item.root is None for item in items)


def test_records_name_media_by_path_or_by_modality_and_keep_their_other_keys() -> None:
    records = [
        {"path": "a.png", "modality": "thermal", "embedding": [1], "note": "x"},
        {"question_id": 7, "image": "b.jpg", "audio": ["c.wav", "d.wav"], "text": "?"},
        {"path": "e.bin"},
    ]
    items = listed("\n".join(map(json.dumps, records)), modality="depth")
    assert [(item.path, item.modality) for item in items] == [
        ("a.png", "thermal"),
        ("b.jpg", "image"),
        ("c.wav", "audio"),
        ("d.wav", "audio"),
        ("e.bin", "depth"),
    ]
    assert items[0].carried == {"path": "a.png", "modality": "thermal", "note": "x"}
    assert items[2].carried["question_id"] == 7


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"id": 1}, "<stdin>:1: a record names no medium under path, image, ..."),
        ({"path": 5}, "<stdin>:1: path must be a file name"),
        ({"path": "a", "modality": "smell"}, "<stdin>:1: 'smell' is not one of image, video"),
        ({"image": {}}, "<stdin>:1: image must be a file name or a list of them"),
    ],
)
def test_a_record_that_cannot_be_used_is_an_item_with_a_problem(
    record: dict[str, object], problem: str
) -> None:
    (item,) = listed(json.dumps(record))
    with pytest.raises(RecordError) as error:
        item.open()
    assert str(error.value).startswith(problem)


def test_a_line_that_is_not_json_is_an_item_with_a_problem_and_its_number() -> None:
    first, broken, last = listed('{"path": "a"}\nb.jpg\n{"path": "c"}')
    assert (first.path, last.path) == ("a", "c")
    assert broken.problem == "<stdin>:2: is not JSON (Expecting value)"
    assert broken.output(None) == {"line": 2}


def test_what_encode_writes_itself_is_not_carried() -> None:
    record = {
        "path": "a",
        "encoder": "x@1",
        "normalized": 0,
        "label_set": 1,
        "labels": [],
        "line": 1,
    }
    (item,) = listed(json.dumps({**record, "labels": [], "embedding": [], "error": "e", "note": 7}))
    assert item.output("image") == {"path": "a", "note": 7, "modality": "image"}


def test_media_of_records_stay_in_the_media_root(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "root").mkdir()
    (item,) = listed('{"image": "../secret.png"}', root=tmp_path / "root")
    with pytest.raises(MediaError, match="leaves the media root"):
        item.open()


def test_paths_below_the_media_root_get_the_name_that_records_use(tmp_path: Path) -> None:
    folder = MediaRoot(tmp_path)
    paths = [str(tmp_path / "a" / "b.png"), "/elsewhere/c.png", "https://example.org/d.png"]
    items = list(items_of_paths(paths, folder, None))
    assert [item.name for item in items] == ["a/b.png", *paths[1:]]
    assert [item.path for item in items] == paths


def test_a_training_file_names_each_medium_once(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]
    records = [{"id": i, "image": f"{i % 2}.jpg", "conversations": turns} for i in range(5)]
    records.append({"id": 9, "conversations": turns})  # words only: nothing to encode
    (tmp_path / "chat.json").write_text(json.dumps(records))
    items = list(items_of_training_file(tmp_path / "chat.json", MediaRoot(), None))
    assert [(item.path, item.modality) for item in items] == [
        ("0.jpg", "image"),
        ("1.jpg", "image"),
    ]
    assert items[0].carried == {}


def test_a_file_name_that_is_not_utf_8_is_opened_and_told_in_text(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.jpg")).write_bytes(b"x")
    line = os.fsencode(tmp_path) + b"/\xff.jpg\n"
    stream = io.BufferedReader(io.BytesIO(line))  # type: ignore[arg-type]
    (item,) = items_of_list("-", MediaRoot(tmp_path), None, stdin=stream)
    assert item.path == f"{tmp_path}/\\xff.jpg"
    assert item.name == "\\xff.jpg"
    assert item.open().head(1) == b"x"
    item.output(None)["path"].encode()


def test_a_training_file_with_bad_records_names_each(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text('{"image": 1}\n7\n{"image": "a.jpg"}\n{"image": 1}\n')
    items = list(items_of_training_file(tmp_path / "chat.jsonl", MediaRoot(), None))
    assert [item.line for item in items] == [1, 2, None, 4]

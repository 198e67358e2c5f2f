"""Files of records are checked once; what came of it is found again."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from chatbind_cli.data import checked, record_file
from chatbind_cli.data.checked import checked_ahead, checked_file
from chatbind_cli.data.conversations import Conversation, Conversations, Media, checked_row
from chatbind_cli.errors import RecordError
from chatbind_cli.media.medium import Medium


def talk(number: int, **keys: Any) -> dict[str, Any]:
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"A {number}."}]
    return {"id": number, "image": f"{number % 7}.jpg", "conversations": said, **keys}


RECORDS = [*map(talk, range(20)), {"id": "none"}, talk(20, image=None), talk(21)]


@pytest.fixture
def keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Path]]:
    """Has small files kept, too, in several parts; tells what is."""
    monkeypatch.setattr(record_file, "_BATCH_ROWS", 4)
    monkeypatch.setattr(checked, "_KEPT_FROM_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda: sorted(tmp_path.glob("cache/chatbind/conversations/*.arrow"))


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(records))
    return path


def conversations(path: Path) -> list[Conversation]:
    return list(Conversations.of_files([checked_file(path)]))


def test_a_file_is_checked_once_under_whatever_name(tmp_path, keep, monkeypatch) -> None:
    first = write(tmp_path / "a.json", RECORDS)
    (found,) = [checked_file(first)]
    assert [c.id for c in Conversations.of_files([found])] == [*range(20), 21]
    assert len(found) == 23
    assert [error["record"] for error in found.errors()] == [f"{first}[20]", f"{first}[21]"]
    assert found.errors()[1]["error"].startswith(f"{first}[21] (id 20): 1 <image> placeholder")
    assert len(keep()) == 1

    def check(*args: object) -> None:
        raise AssertionError("checked again")

    monkeypatch.setattr(checked, "checked_row", check)
    second = first.rename(tmp_path / "b.json")
    again = checked_file(second)
    assert conversations(second)[-1].where == f"{second}[22]"
    assert again.errors()[0]["error"].startswith(f"{second}[20] (id none): a record has neither")
    mapped = pickle.loads(pickle.dumps(Conversations.of_files([again])))
    assert list(mapped) == conversations(second)
    assert len(pickle.dumps(again)) < 500  # the file, and not what is in it


def test_those_who_ask_at_the_same_time_wait_for_the_first(tmp_path, keep, monkeypatch) -> None:
    path = write(tmp_path / "a.json", RECORDS)
    looked_at = []

    def slow(record, where):
        looked_at.append(where)
        time.sleep(0.01)
        return checked_row(record, where)

    monkeypatch.setattr(checked, "checked_row", slow)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(conversations, [path] * 3))
    assert found[0] == found[1] == found[2]
    assert len(looked_at) == len(RECORDS)


def test_files_are_checked_ahead_by_other_processes(tmp_path, keep, monkeypatch, capfd) -> None:
    good = [write(tmp_path / f"{n}.json", [*RECORDS, talk(n)]) for n in range(3)]
    (tmp_path / "broken.json").write_text("[1")
    asked = [tmp_path / "broken.json", *good, tmp_path / "none.json"]
    with checked_ahead(asked) as takes_time:
        assert takes_time
        deadline = time.monotonic() + 60
        while len(keep()) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
    # what it cannot check is not its to tell
    said = capfd.readouterr().err.splitlines()
    assert [line for line in said if not line.endswith("what comes of it")] == []

    def check(*args: object) -> None:
        raise AssertionError("checked again")

    monkeypatch.setattr(checked, "checked_row", check)
    assert [len(conversations(path)) for path in good] == [22] * 3
    with pytest.raises(RecordError, match=r"broken\.json:1: is not a JSON array"):
        checked_file(asked[0])
    with checked_ahead(good) as takes_time:
        assert not takes_time


def test_who_does_not_wait_for_what_is_checked_ahead_ends_it(tmp_path, keep) -> None:
    path = write(tmp_path / "a.json", [talk(n) for n in range(100_000)])
    began = time.monotonic()
    with checked_ahead([path]):
        while not list(tmp_path.glob("cache/chatbind/conversations/.*.tmp")):
            assert time.monotonic() < began + 60
            time.sleep(0.01)
    assert [p.suffix for p in tmp_path.glob("cache/chatbind/conversations/*")] == [".lock"]


def test_another_content_is_checked_anew(tmp_path, keep) -> None:
    path = write(tmp_path / "a.json", RECORDS[:3])
    assert len(conversations(path)) == 3
    write(path, RECORDS[:2])
    assert len(conversations(path)) == 2
    assert len(keep()) == 2


@pytest.mark.parametrize("broken", [b"", b"ARROW1\0\0", b"x" * 5000])
def test_a_kept_file_that_is_broken_is_made_anew(tmp_path, keep, broken) -> None:
    path = write(tmp_path / "a.json", RECORDS)
    before = conversations(path)
    (kept,) = keep()
    whole = kept.read_bytes()
    kept.write_bytes(broken or whole[:-100])
    assert conversations(path) == before
    assert kept.read_bytes() == whole


def test_what_cannot_be_kept_is_held_in_memory(tmp_path, keep, monkeypatch, capsys) -> None:
    path = write(tmp_path / "a.json", RECORDS)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = Conversations.of_files([checked_file(path)])
    assert "are held in memory" in capsys.readouterr().err
    assert len(found) == 21
    assert list(pickle.loads(pickle.dumps(found))) == list(found)


def test_a_full_disk_leaves_nothing(tmp_path, keep, monkeypatch, capsys) -> None:
    path = write(tmp_path / "a.json", RECORDS)
    whole = checked.write_rows

    def fill(rows, sink) -> None:
        whole(rows, "/dev/full" if isinstance(sink, str) else sink)

    monkeypatch.setattr(checked, "write_rows", fill)
    assert len(conversations(path)) == 21
    assert "No space left on device" in capsys.readouterr().err
    assert [p for p in tmp_path.glob("cache/chatbind/conversations/*") if p.suffix != ".lock"] == []


def test_a_file_that_ends_in_the_middle_is_not_kept(tmp_path, keep) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(RECORDS)[:-20])
    with pytest.raises(RecordError, match="is not a JSON array"):
        checked_file(path)
    assert keep() == []


def test_a_number_and_a_text_come_back_exactly(tmp_path, keep) -> None:
    exact = [talk(2**70), talk(2**64 - 1), talk(-(2**63)), talk(1, note=[1e-320, 0.1, True])]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in exact))
    found = checked_file(path)
    assert [found.record(i) for i in range(4)] == [
        (record, f"{path}:{n}") for n, record in enumerate(exact, start=1)
    ]


def test_media_are_named_once_and_left_out_by_name(tmp_path, keep) -> None:
    records = [*RECORDS, talk(40, image=["8.jpg", "9.jpg"], audio="8.jpg")]
    value = records[-1]["conversations"][0]
    value["value"] = "<image> <audio> <image>"
    found = Conversations.of_files([checked_file(write(tmp_path / "a.json", records))])
    media = Media(found)
    names = [f"{n}.jpg" for n in (*range(7), 8, 9)]
    assert list(media) == [*(Medium("image", n) for n in names), Medium("audio", "8.jpg")]
    assert len(media) == 10
    assert media[::4] == list(media)[::4]
    assert media.modalities() == ["image", "audio"]
    assert [media.names(m) for m in ("image", "audio", "imu")] == [names, ["8.jpg"], []]
    left = found.without([Medium("audio", "8.jpg"), Medium("image", "0.jpg")])
    assert [c.id for c in left] == [n for n in (*range(20), 21) if n % 7]
    assert len(Media(left, found)) == 10
    assert len(found.without([])) == len(found)


def test_of_a_file_without_bad_records_the_right_ones_are_left_out(tmp_path, keep) -> None:
    path = write(tmp_path / "a.json", [talk(n) for n in range(20)])
    left = Conversations.of_files([checked_file(path)]).without([Medium("image", "5.jpg")])
    assert [c.id for c in left] == [n for n in range(20) if n % 7 != 5]


def test_sizes_follow_the_texts(tmp_path, keep) -> None:
    records = [talk(10), {"id": 1}, talk(11)]
    records[2]["conversations"][1]["value"] += "x" * 100
    found = Conversations.of_files([checked_file(write(tmp_path / "a.json", records))])
    short, long = found.sizes()
    assert long == short + 100


def test_an_epoch_sees_files_by_their_weights(tmp_path) -> None:
    a = checked_file(write(tmp_path / "a.json", [talk(n) for n in range(10)]))
    b = checked_file(write(tmp_path / "b.json", [talk(n) for n in range(10, 15)]))
    both = Conversations.of_files([a, b])

    def seen(weights, seed):
        return [c.id for c in both.seen(weights, seed)]

    assert seen([1, 1], 0) == list(range(15))
    drawn = seen([0.3, 2.6], 1)
    assert len(set(drawn[:3])) == 3
    assert drawn[:3] == sorted(drawn[:3])
    assert drawn[3:13] == [*range(10, 15)] * 2
    assert len(set(drawn[13:])) == 3
    assert drawn == seen([0.3, 2.6], 1)
    assert any(seen([0.3, 2.6], seed) != drawn for seed in range(2, 5))
    # the weight of one file does not change what is drawn of another
    assert seen([0.3, 1], 1)[:3] == drawn[:3]
    assert list(both.seen([0.3, 2.6], 1).sizes()) == [both.sizes()[identity] for identity in drawn]
    assert {m.name for m in Media(both.seen([0.1, 0.2], 1))} < {m.name for m in Media(both)}

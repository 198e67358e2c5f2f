"""Records: formats, positions in errors, and output files that a second run continues."""

from __future__ import annotations

import gzip
import io
import json
import os
import tracemalloc
import zlib

import pytest
import zstandard

from chatbind_cli.errors import ChatBindError, RecordError, UsageError
from chatbind_cli.jsonl import RecordWriter, dumps, legible, read_lines, read_records, record_id

ROWS = [{"question_id": 1, "text": "é"}, {"question_id": 2, "text": "b"}]
LINES = "".join(dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
@pytest.mark.parametrize("text", [LINES, json.dumps(ROWS), "\n" + json.dumps(ROWS, indent=1)])
def test_jsonl_and_arrays_are_read_plain_and_compressed(tmp_path, pack, text):
    path = tmp_path / "records"  # no ending: the content says what it is
    path.write_bytes(pack(text.encode()))
    assert [record for record, _ in read_records(path)] == ROWS
    stdin = io.BytesIO(pack(text.encode()))
    assert [line.record for line in read_lines("-", stdin=stdin)] == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', "f:2: is not JSON"),
        (b'{"a": 1}\n\n3\n', "f:3: must be a JSON object, not int"),
        (b'{"a": 1}\n\xff\n', "f:2: is not UTF-8"),
        (b'[{"a": 1}, 2]', r"f\[1\]: must be a JSON object"),
        (b'[{"a": 1},\n', "f:2: is not a JSON array"),
        (gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-20], "f: broken compression"),
        (zstandard.compress(b'{"a": 1}\n' * 1000)[:-4], "f: broken compression"),
        (zstandard.compress(b'{"a": 1}\n' * 1000)[:4], "f: broken compression"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 40, "f: broken compression"),
        (gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:20] + b"x" * 30, "f: broken compression"),
        (b'{"a": NaN}', "f:1: has a number that"),
        (b'{"a": 1e999}', "f:1: has a number that is too large"),
        (b'{"a": 1' + b"0" * 400 + b".0}", "f:1: has a number that is too large"),
        (b'[{"a": -Infinity}]', r"f\[0\]: has a number that"),
        (b'{"a": "\\ud800"}', "f:1: has text that is not UTF-8"),
        (b'{"a": "\\udc80"}', "f:1: has text that is not UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "f:1: has a number that is too large"),
        (b"[" * 100_000, "is not a JSON array|nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "f:1: is nested too deeply"),
        (b"\n" * 1_000_100, "f:1000001: 1,000,000 empty lines in a row"),
    ],
)
def test_an_error_names_the_file_and_the_line(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(RecordError, match=message):
        list(read_records("f"))


BAD_LINES = {
    b"not json": "is not JSON (Expecting value)",
    b"[1]": "must be a JSON object, not list",
    b"\xff\xfe": "is not UTF-8 text",
    b'{"a":' * 5000: "is nested too deeply",
    b'{"question_id": 1e999}': "has a number that is too large, or NaN",
    b'{"a": "\0"}': "is not JSON (Invalid control character at)",
}


def test_a_bad_line_stands_among_the_others(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"".join(line + b'\r\n\n{"a": 1}\n' for line in BAD_LINES))
    read = list(read_lines(path))
    assert [str(line.problem).removeprefix(f"{line.where}: ") for line in read[::2]] == list(
        BAD_LINES.values()
    )
    assert [line.number for line in read[::2]] == [1, 4, 7, 10, 13, 16]
    assert [(line.record, line.problem) for line in read[1::2]] == [({"a": 1}, None)] * 6


def test_a_bad_element_stands_among_the_others_however_the_array_is_read(tmp_path):
    elements = [b'{"a": 1}', b"7", b'{"a": NaN, "id": "x"}', b'{"a": "\xff"}', b'{"a": "]"}', b"{}"]
    path = tmp_path / "f"
    path.write_bytes(b"\xef\xbb\xbf [\n" + b" ,\n".join(elements) + b"]\n")
    read = list(read_lines(path))
    assert [line.problem is None for line in read] == [True, False, False, False, True, True]
    assert [line.record for line in read] == [{"a": 1}, {}, {"id": "x"}, {}, {"a": "]"}, {}]
    assert [line.number for line in read] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_an_array_may_be_cut_anywhere_while_it_is_read(monkeypatch, chunk):
    monkeypatch.setattr("chatbind_cli.json_text._CHUNK_BYTES", chunk)
    rows = [{"n": 12, "s": 'é"]},[{\\'}, {"l": [1, {"x": 2.5}]}, {}]
    text = "[" + ",\n ".join(json.dumps(row, ensure_ascii=False) for row in rows) + "]"
    head, rest = text[:1], text[1:]
    stream = io.BufferedReader(io.BytesIO(f"{head}\n{rest}\n".encode()))
    assert [line.record for line in read_lines("-", stdin=stream)] == rows
    broken = io.BytesIO(f"{head}\n{rest[:-1]} x]".encode())
    with pytest.raises(RecordError, match="<stdin>:4: is not a JSON array .Expecting ',' delim"):
        list(read_lines("-", stdin=broken))


@pytest.fixture
def most_memory(monkeypatch):
    """Tells the most bytes that were held since the test began; a record may have a MiB."""
    monkeypatch.setattr("chatbind_cli.json_text.MOST_BYTES", 1 << 20)
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


def test_what_an_array_costs_does_not_grow_with_it(tmp_path, most_memory):
    path = tmp_path / "f"
    path.write_text("[" + ",".join(json.dumps({"a": "x" * 1000}) for _ in range(20_000)) + "]")
    tracemalloc.reset_peak()
    assert sum(1 for _ in read_records(path)) == 20_000
    assert most_memory() < 10e6


@pytest.mark.parametrize("start", [b'{"a": 1}\n', b'{"a": 1}\n{"b": "', b"[", b'["'])
@pytest.mark.parametrize("pack", ["gzip", "zstd"])
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, most_memory, pack, start):
    new = zlib.compressobj(9, 8, 31) if pack == "gzip" else zstandard.ZstdCompressor().compressobj()
    spaces = b" " * (1 << 20)
    packed = [new.compress(start), *(new.compress(spaces) for _ in range(100)), new.flush()]
    (tmp_path / "f").write_bytes(b"".join(packed))
    tracemalloc.reset_peak()
    read = []
    with pytest.raises(RecordError, match=r"without end|is longer than|nothing but spaces"):
        for line in read_lines(tmp_path / "f"):
            read.append(line)
    assert most_memory() < 80e6
    good = [line.record for line in read if line.problem is None]
    assert good == [{"a": 1}] * start.startswith(b"{")


def test_a_line_that_is_too_long_does_not_take_the_others_along(tmp_path, monkeypatch):
    monkeypatch.setattr("chatbind_cli.json_text.MOST_BYTES", 100)
    path = tmp_path / "f"
    path.write_bytes(b"\n".join([b"x" * 99, b"x" * 350, b'{"a": 1}', b"x" * 100, b"y" * 200]))
    assert [str(line.problem).partition(": ")[2] for line in read_lines(path)] == [
        "is not JSON (Expecting value)",
        "is longer than 64 MiB",
        "",
        "is longer than 64 MiB",
        "is longer than 64 MiB",
    ]


def test_what_came_before_the_end_of_a_broken_stream_is_read(tmp_path):
    lines = b"".join(b'{"a": %d}\n' % n for n in range(1000))
    for content in (gzip.compress(lines)[:-4], gzip.compress(lines) + b"rubbish"):
        path = tmp_path / "f"
        path.write_bytes(content)
        read = []
        with pytest.raises(RecordError, match="f: broken compression"):
            for record, _ in read_records(path):
                read.append(record["a"])
        assert read == list(range(1000))


def test_a_zstd_window_that_would_take_gigabytes_is_refused(tmp_path):
    wide = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=False)
    packer = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    (tmp_path / "f").write_bytes(packer.compress(b'{"a": 1}\n') + packer.flush())
    with pytest.raises(RecordError, match="f: broken compression .*memory"):
        list(read_lines(tmp_path / "f"))


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(RecordError, match="No such file or directory; check the path"):
        list(read_records(tmp_path / "nosuch"))


def test_reading_starts_before_the_stream_ends():
    class Slow(io.RawIOBase):
        given = 0

        def readable(self):
            return True

        def readinto(self, buffer):
            assert self.given == 0, "read further than the first record"
            line = b'{"a": 1}\n'
            buffer[: len(line)] = line
            self.given += 1
            return len(line)

    line = next(read_lines("-", stdin=io.BufferedReader(Slow())))
    assert line == ({"a": 1}, "<stdin>:1", 1, None)


def test_an_id_is_text_or_a_whole_number():
    assert record_id({"id": "x"}) == "x"
    assert record_id({"question_id": 0, "id": "x"}) == 0
    for bad in ({}, {"id": 1.5}, {"id": True}, {"id": ["a"]}):
        with pytest.raises(RecordError):
            record_id(bad)


def test_a_second_run_goes_by_id_and_drops_the_half_written_line(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text(LINES + '{"question_id": 3, "te')
    with RecordWriter(path) as writer:
        assert writer.done == {1, 2}
        writer.write({"question_id": 3})
        writer.write({"question_id": 4, "error": "x"})
        assert writer.done == {1, 2, 3}
    assert path.read_text().startswith(LINES + '{"question_id": 3}\n{"question_id": 4, ')


def test_a_file_in_a_folder_that_is_not_there_yet(tmp_path):
    with RecordWriter(tmp_path / "new" / "out.jsonl") as writer:
        writer.write({"question_id": 1})
    assert (tmp_path / "new" / "out.jsonl").read_text() == '{"question_id": 1}\n'


def test_a_half_written_line_that_is_whole_json_is_dropped_too(tmp_path):
    # Killed between the object and its line end: the next record would land on the same line.
    path = tmp_path / "out.jsonl"
    path.write_text(LINES.rstrip("\n"))
    with RecordWriter(path) as writer:
        assert writer.done == {1}


def test_failed_and_doubled_records_leave_the_file_when_it_is_continued(tmp_path):
    path = tmp_path / "out.jsonl"
    failed = dumps({"question_id": 9, "error": "x"}) + "\n"
    path.write_text(failed + LINES + LINES)
    with RecordWriter(path) as writer:
        assert writer.done == {1, 2}
    assert path.read_text() == LINES


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_pipe_is_written_and_neither_read_nor_removed(tmp_path, overwrite):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with RecordWriter(path, overwrite=overwrite) as writer:
        writer.write({"question_id": 1})
    assert os.read(reader, 100) == b'{"question_id": 1}\n'
    os.close(reader)
    assert path.is_fifo()


def test_overwrite_starts_anew(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"question_id": 2}\nnot a record\n')
    (tmp_path / "kept").hardlink_to(path)
    with RecordWriter(path, overwrite=True) as writer:
        assert writer.done == set()
        writer.write({"question_id": 1})
    assert path.read_text() == '{"question_id": 1}\n'
    assert "not a record" in (tmp_path / "kept").read_text()


OURS = {
    "nothing": "",
    "blank lines": "\n\n",
    "a record": '{"question_id": 1, "model_id": "m"}\n',
    "another model's": '\n{"question_id": 1, "model_id": "n"}\n{"question_',
    "a failed record": '{"question_id": 1, "error": "x"}\n',
    "a failed line": '{"line": 3, "error": "x"}\n',
    "half a record": '{"question_id": 1, "mod',
    "one byte": "{",
}
FOREIGN = {
    "a text": "Chapter one\n",
    "a line": "Chapter one",
    "questions": '{"question_id": 1, "text": "?"}\n',
    "a question without an end": '{"question_id": 1, "text": "?"}',
    "other records": '{"id": 1, "model_id": "m"}\n',
    "indented JSON": '{\n "question_id": 1, "model_id": "m"}\n',
    "a list": '[{"question_id": 1, "model_id": "m"}]\n',
    "deep JSON": "[" * 100_000 + "\n",
    "a number": "1\n",
}


@pytest.mark.parametrize("name", [*OURS, *FOREIGN])
def test_overwrite_replaces_a_file_of_the_same_records_only(tmp_path, name):
    path = tmp_path / "out.jsonl"
    path.write_text(OURS.get(name, FOREIGN.get(name)))
    if name in OURS:
        RecordWriter(path, overwrite=True, expect={"model_id": "m"}).close()
        assert path.read_bytes() == b""
        return
    with pytest.raises(ChatBindError, match="is not a file of records with question_id, model_id"):
        RecordWriter(path, overwrite=True, expect={"model_id": "m"})
    assert path.read_text() == FOREIGN[name]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_something_else_is_not_continued(tmp_path, name):
    path = tmp_path / "thesis.txt"
    path.write_text(FOREIGN[name])
    with pytest.raises(RecordError, match=r"txt:1: .* record with question_id, model_id.*--overw"):
        RecordWriter(path, expect={"model_id": "m"})
    assert path.read_text() == FOREIGN[name]


def test_another_model_s_file_is_not_continued(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"question_id": 1, "model_id": "a"}\n')
    with pytest.raises(RecordError, match="has model_id 'a', but this run has 'b'"):
        RecordWriter(path, expect={"model_id": "b"})


def test_several_keys_make_one_id(tmp_path):
    with RecordWriter(tmp_path / "o", key=("path", "modality")) as writer:
        writer.write({"path": "a", "modality": "image"})
    with RecordWriter(tmp_path / "o", key=("path", "modality")) as writer:
        assert writer.done == {("a", "image")}


def test_nan_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        dumps({"loss": float("nan")})


def test_a_whole_surrogate_pair_is_a_character():
    (line,) = read_lines("-", stdin=io.BytesIO(b'{"a": "\\ud83d\\ude00"}'))
    assert line.record == {"a": "\U0001f600"}


def test_several_zstd_frames_are_one_file():
    two = zstandard.compress(b'{"a": 1}\n') + zstandard.compress(b'{"a": 2}\n')
    assert [line.record["a"] for line in read_lines("-", stdin=io.BytesIO(two))] == [1, 2]


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_runs_do_not_write_one_file(tmp_path, overwrite):
    path = tmp_path / "out"
    with RecordWriter(path) as first:
        first.write({"question_id": 1})
        with pytest.raises(ChatBindError, match="another process is writing it"):
            RecordWriter(path, overwrite=overwrite)
        first.write({"question_id": 2})
    with RecordWriter(path) as again:
        assert again.done == {1, 2}


def test_a_file_that_was_compacted_is_still_its_writer_s_alone(tmp_path):
    path = tmp_path / "out"
    path.write_text('{"question_id": 1, "error": "x"}\n{"question_id": 2}\n')
    with RecordWriter(path) as writer:
        with pytest.raises(ChatBindError, match="another process"):
            RecordWriter(path)
        writer.write({"question_id": 1})
    assert [r["question_id"] for r, _ in read_records(path)] == [2, 1]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_name_that_promises_compression_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match="pipe it through"):
        RecordWriter(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_person_at_a_terminal_reads_words_and_a_file_gets_records(tmp_path, capsys, monkeypatch):
    def write(target):
        with RecordWriter(target, key="n", in_words=lambda record: f"n is {record['n']}") as writer:
            writer.write({"n": 1})

    write("-")
    assert json.loads(capsys.readouterr().out) == {"n": 1}
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    write("-")
    assert capsys.readouterr().out == "n is 1\n"
    write(tmp_path / "f")
    assert json.loads((tmp_path / "f").read_text()) == {"n": 1}


def test_a_name_that_is_not_utf_8_is_written_as_text():
    name = os.fsdecode(b"caf\xe9 \xc3\xa9.png")
    assert legible(name) == "caf\\xe9 é.png"
    line = dumps({"path": name})
    assert json.loads(line.encode()) == {"path": legible(name)}


def test_an_output_that_cannot_be_written_is_one_line():
    with (
        pytest.raises(ChatBindError, match="/dev/full: cannot be written .No space left on dev"),
        RecordWriter("/dev/full") as writer,
    ):
        writer.write({"question_id": 1})


def test_what_failed_can_stay_until_it_is_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    kept = '{"line": 3, "error": "is not JSON"}\n{"question_id": 1, "error": "x"}\n' + LINES
    path.write_text(kept + '{"question_id": 9, "error": "cut o')
    with RecordWriter(path, keep_failed=True) as writer:
        assert writer.done == {1, 2}
    assert path.read_text() == kept


def test_what_failed_without_an_id_is_written_anew(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"line": 3, "error": "is not JSON"}\n' + LINES)
    with RecordWriter(path) as writer:
        assert writer.done == {1, 2}
    assert path.read_text() == LINES
    log = '{"error": "of another program"}\n'
    path.write_text(log)
    with pytest.raises(RecordError, match="is not a record with question_id"):
        RecordWriter(path)
    assert path.read_text() == log

from __future__ import annotations

import base64
import hashlib
import io
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from chatbind_cli.errors import MediaError
from chatbind_cli.media import fetch
from chatbind_cli.media.root import MediaRoot
from chatbind_cli.media.source import MediaSource, open_source, shown


def content(source: MediaSource) -> bytes:
    with source.open() as stream:
        return stream.read()


def test_a_path_is_read_where_it_lies_and_hashed_by_content(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"hello")
    for ref in (path, str(path)):
        source = open_source(ref)
        assert source.path == path and source.data is None
        assert content(source) == b"hello" and source.size == 5
        assert source.sha256 == hashlib.sha256(b"hello").hexdigest()


def test_bytes_and_stdin_and_data_uris_give_the_same_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    plain = base64.b64encode(data).decode()
    refs = [
        open_source(data),
        open_source("-"),
        open_source(f"data:image/png;base64,{plain}"),
        open_source(f"DATA:;base64,{plain.rstrip('=')}"),
        open_source(f"data:;base64,{base64.urlsafe_b64encode(data).decode()}"),
        open_source("data:," + "".join(f"%{byte:02x}" for byte in data)),
    ]
    assert {source.sha256 for source in refs} == {hashlib.sha256(data).hexdigest()}


def test_a_path_object_named_like_stdin_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-").write_bytes(b"x")
    assert open_source(Path("-")).path is not None


@pytest.mark.parametrize(
    ("ref", "what"),
    [
        ("missing.jpg", "no such file"),
        ("", "is not a file name"),
        ("a\0b", "is not a file name"),
        ("file:///etc/passwd", "file addresses are not read"),
        ("ftp://example.org/x.jpg", "ftp addresses are not read"),
        ("data:image/png;base64", "without a comma"),
        ("data:;base64,!!!!", "broken base64"),
        ("/dev/zero", "is not a file"),
        (b"", "is empty"),
        ("x" * 5000, "cannot be read"),
    ],
)
def test_what_is_no_source_is_one_line(ref: str | bytes, what: str) -> None:
    with pytest.raises(MediaError, match=what) as caught:
        open_source(ref)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="is a folder"):
        open_source(tmp_path)


def test_streams_stop_at_the_limit_without_being_read_to_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetch, "MOST_BYTES", 1000)

    class Endless(io.RawIOBase):
        given = 0

        def read(self, size: int = -1) -> bytes:
            self.given += size
            return bytes(size)

    endless = Endless()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=endless))
    with pytest.raises(MediaError, match="standard input: is larger"):
        open_source("-")
    assert endless.given < 10_000_000
    with pytest.raises(MediaError, match="is larger"):
        open_source("data:," + "x" * 5000, limits=fetch.Limits(1000))


def test_a_named_pipe_is_read_like_stdin(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(b"through"))
    writer.start()
    source = open_source(pipe)
    writer.join(timeout=5)
    assert source.data == b"through" and source.ref == str(pipe)


def test_a_file_that_vanishes_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "gone"
    path.write_bytes(b"x")
    source = open_source(path)
    path.unlink()
    with pytest.raises(MediaError, match="gone: cannot be read"):
        source.open()
    with pytest.raises(MediaError, match="gone: cannot be read"):
        _ = source.sha256


def test_names_in_errors_are_short_and_keep_no_password() -> None:
    assert MediaSource(ref="http://me:secret@host/x.jpg", data=b"x").name == "http://host/x.jpg"
    assert len(MediaSource(ref="data:," + "x" * 9999, data=b"x").name) == 100
    assert "\n" not in MediaSource(ref="a\nb", data=b"x").name


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "secret.txt").write_text("secret")
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.jpg").write_bytes(b"a")
    (root / "link.jpg").symlink_to(tmp_path / "secret.txt")
    (root / "inner.jpg").symlink_to(root / "sub" / "a.jpg")
    (root / "out").symlink_to(tmp_path)
    return root


def test_records_reach_files_inside_the_root_and_links_that_stay_inside(root: Path) -> None:
    assert MediaRoot(root).find("sub/a.jpg") == root / "sub/a.jpg"
    assert MediaRoot(root).find("inner.jpg").read_bytes() == b"a"
    assert MediaRoot(root).find("./sub//a.jpg").read_bytes() == b"a"


@pytest.mark.parametrize(
    "name", ["../secret.txt", "sub/../../secret.txt", "/etc/passwd", "link.jpg", "out/secret.txt"]
)
def test_records_cannot_leave_the_root_unless_allowed(root: Path, name: str) -> None:
    with pytest.raises(MediaError, match="leaves the media root; allow it with --allow-outside"):
        MediaRoot(root).find(name)
    assert MediaRoot(root, allow_outside=True).find(name).is_file()


@pytest.mark.parametrize("name", ["missing.jpg", "sub", "", "a\0b", "x" * 5000])
def test_what_is_not_there_is_one_line(root: Path, name: str) -> None:
    with pytest.raises(MediaError) as caught:
        MediaRoot(root).find(name)
    assert "\n" not in str(caught.value)


def test_a_link_that_leads_to_itself_is_one_line(root: Path) -> None:
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises(MediaError):
        MediaRoot(root).find("loop")


@pytest.mark.parametrize("name", ["val2014", "coco2014_val"])
def test_coco_prefixes_are_added_where_only_the_prefixed_file_exists(
    name: str, tmp_path: Path
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "COCO_val2014_000001.jpg").write_bytes(b"a")
    (folder / "000002.jpg").write_bytes(b"b")
    assert MediaRoot(folder).find("000001.jpg").name == "COCO_val2014_000001.jpg"
    assert MediaRoot(folder).find("000002.jpg").name == "000002.jpg"
    found = MediaRoot(tmp_path, "COCO_val2014_").find(f"{name}/000001.jpg")
    assert found == folder / "COCO_val2014_000001.jpg"
    assert MediaRoot(folder, "COCO_val2014_").find("COCO_val2014_000001.jpg").is_file()


@pytest.mark.parametrize("listed_from", [0, 1_000_000])
@pytest.mark.parametrize("allow_outside", [False, True])
@pytest.mark.parametrize("prefix", ["", "COCO_val2014_"])
def test_many_names_are_found_as_one_is(
    root: Path, prefix: str, allow_outside: bool, listed_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatbind_cli.media.root._WORTH_LISTING", listed_from)
    names = ["sub/a.jpg", "./sub//a.jpg", "sub/../sub/a.jpg", "inner.jpg", "link.jpg"]
    names += ["out/secret.txt", "../secret.txt", "sub/../../secret.txt", "sub", "sub/", "", ".."]
    names += [str(root / "sub" / "a.jpg"), "a\0b", "x\0/b", "x" * 5000, "out/root/sub/a.jpg"]
    names += ["gone.jpg", "gone/a.jpg", "inner.jpg/a", "val/1.jpg", "val/COCO_val2014_1.jpg"]
    (root / "plain.jpg").write_bytes(b"a")
    names += ["plain.jpg", "/plain.jpg", f"{root}/plain.jpg"]
    (root / "val").mkdir()
    (root / "val" / "COCO_val2014_1.jpg").write_bytes(b"a")
    (root / "val" / "link.jpg").symlink_to(root.parent / "secret.txt")
    (root / "val" / "COCO_val2014_link.jpg").symlink_to(root.parent / "secret.txt")
    names += ["val/link.jpg", "/inner.jpg", "/"]
    media = MediaRoot(root, prefix, allow_outside)
    wanted = {}
    for name in names:
        try:
            media.find(name)
        except MediaError as error:
            wanted[name] = str(error)
    assert media.missing(names) == wanted
    assert len(wanted) < len(names) - 1


def test_a_folder_of_many_is_asked_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"sub/{n}.jpg" for n in range(100)]
    for name in names[1:]:
        (root / name).write_bytes(b"a")
    looked_for = []
    find = MediaRoot.find
    monkeypatch.setattr(MediaRoot, "find", lambda s, name: looked_for.append(name) or find(s, name))
    assert list(MediaRoot(root).missing(names)) == names[:1]
    assert looked_for == names[:1]


def test_a_pipe_that_nobody_writes_to_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(fetch, "TOTAL_SECONDS", 1.0)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MediaError, match=r"pipe: nothing was written to it in 0\.2 s"):
        open_source(tmp_path / "pipe")


def test_a_writer_may_be_slow_to_begin_but_not_fall_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(fetch, "TOTAL_SECONDS", 10.0)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write(late: float, pause: float, rest: float) -> None:
        time.sleep(late)
        with pipe.open("wb", buffering=0) as stream:
            time.sleep(pause)
            with suppress(BrokenPipeError):
                stream.write(b"first")
                time.sleep(rest)
                stream.write(b", rest")

    def read(*pauses: float) -> bytes | None:
        writer = threading.Thread(target=write, args=pauses)
        writer.start()
        try:
            return open_source(pipe).data
        finally:
            writer.join(5)

    assert read(0.0, 0.6, 0.05) == b"first, rest"
    assert read(0.1, 0.6, 0.05) == b"first, rest"  # it comes while it is waited for
    with pytest.raises(MediaError, match=r"nothing was written to it in 0\.5 s"):
        read(0.0, 0.0, 1.0)


def test_a_pipe_is_read_no_further_than_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "MOST_BYTES", 1000)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write() -> None:
        with suppress(BrokenPipeError):
            pipe.write_bytes(bytes(10_000_000))

    writer = threading.Thread(target=write)
    writer.start()
    with pytest.raises(MediaError, match="pipe: is larger"):
        open_source(pipe)
    writer.join(5)


def test_a_vast_file_is_refused_before_anybody_hashes_it(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    for size, what in ((200 * 10**9, "larger than 128 GiB"), (60 * 10**9, "nothing but zeros")):
        with path.open("wb") as file:
            file.truncate(size)
        with pytest.raises(MediaError, match=what):
            open_source(path)


def test_a_name_that_is_no_text_is_read_and_shown(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.bin")
    Path(name).write_bytes(b"x")
    source = open_source(name)
    assert content(source) == b"x" and source.sha256
    assert source.name.isprintable() and source.name.encode("utf-8")
    with pytest.raises(MediaError, match="is not a file name"):
        open_source("\ud800.jpg")
    with pytest.raises(MediaError) as caught:
        MediaRoot(tmp_path).find("caf\udce9.jpg")
    assert str(caught.value).encode("utf-8")


def test_megabytes_of_a_data_uri_are_not_looked_at_to_show_it() -> None:
    begun = time.process_time()
    assert len(shown("data:;base64," + "A" * (64 << 20))) == 100
    assert time.process_time() - begun < 1

"""What is remembered of downloads: from where a file came, what was wanted, what came out."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from chatbind_cli.download.archive import unpack
from chatbind_cli.download.fetch import Downloader
from chatbind_cli.download.manifest import MANIFEST, Manifest, ManifestEntry, _origin
from chatbind_cli.download.presence import is_present
from chatbind_cli.download.requests import HubRef, Request, requests_for
from chatbind_cli.errors import DownloadError, UsageError
from chatbind_cli.folders import RECORD
from tests.download.calling import chatbind, zipped


def fetch(words, folder, **kwargs):
    unpacking = kwargs.pop("unpack", False)
    requests = requests_for(words, folder, unpack=unpacking)
    return list(Downloader(**kwargs).fetch_all(requests))


def statuses(records):
    return sorted(record["status"] for record in records)


def tarred(*files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_a_revision_is_no_part_of_where_a_file_comes_from():
    assert _origin("hf:a/b@main/x/y.json") == _origin("hf:a/b/x/y.json") == "hf:a/b/x/y.json"
    assert _origin("hf:datasets/a/b@v1/x") == "hf:datasets/a/b/x"
    assert _origin("http://h/a@b/c") == "http://h/a@b/c"


@pytest.mark.parametrize("verify", [False, True])
def test_a_file_of_the_same_name_from_elsewhere_is_not_taken_for_it(server, tmp_path, verify):
    server.add_repo("a/x", {"config.json": b'{"a": 1}'})
    server.add_repo("b/y", {"config.json": b'{"b": 2}'})
    server.files.update({"/p/f.bin": b"one", "/q/f.bin": b"two"})
    for first, second in (
        ("hf:a/x/config.json", "hf:b/y/config.json"),
        (f"{server.url}/p/f.bin", f"{server.url}/q/f.bin"),
    ):
        assert statuses(fetch([first], tmp_path)) == ["downloaded"]
        (record,) = fetch([second], tmp_path, verify=verify)
        assert record["status"] == "failed"
        assert f"came from {first}" in record["error"] and "--overwrite" in record["error"]
        assert statuses(fetch([first], tmp_path)) == ["present"]
        assert statuses(fetch([second], tmp_path, overwrite=True)) == ["downloaded"]
    assert (tmp_path / "config.json").read_bytes() == b'{"b": 2}'
    assert (tmp_path / "f.bin").read_bytes() == b"two"


def test_another_revision_takes_the_place_of_the_one_before(server, tmp_path):
    server.add_repo("a/x", {"w.bin": b"old"})
    assert statuses(fetch(["hf:a/x@v1/w.bin"], tmp_path)) == ["downloaded"]
    server.add_repo("a/x", {"w.bin": b"new"})
    (record,) = fetch(["hf:a/x@v2/w.bin"], tmp_path)
    assert record["status"] == "downloaded"
    assert (tmp_path / "w.bin").read_bytes() == b"new"


def test_what_is_unpacked_is_held_to_the_hash_that_is_asked_for(server, tmp_path):
    server.files["/b.zip"] = data = zipped(one=b"1")
    url = f"{server.url}/b.zip"
    fetch([url], tmp_path, unpack=True)
    right, wrong = hashlib.sha256(data).hexdigest(), "0" * 64
    assert statuses(fetch([f"{url}#sha256={right}"], tmp_path, unpack=True)) == ["present"]
    for more in ({}, {"verify": True}):
        (record,) = fetch([f"{url}#sha256={wrong}"], tmp_path, unpack=True, **more)
        assert record["status"] == "failed"


def test_one_source_named_twice_has_one_hash(tmp_path):
    hashed = f"http://h/f#sha256={'ab' * 32}"
    (request,) = requests_for([hashed, hashed], tmp_path)
    assert request.checksum == ("sha256", "ab" * 32)
    for other in ("http://h/f", f"http://h/f#sha256={'cd' * 32}"):
        with pytest.raises(UsageError, match="would both become"):
            requests_for([hashed, other], tmp_path)


def test_a_repository_of_which_a_part_came_is_not_there(server, tmp_path):
    server.add_repo("a/h", {"w1.bin": b"1", "w2.bin": b"2", "config.json": b"{}"})
    server.faults["/content/models/a/h/w2.bin"] += [lambda handler: handler.plain(404) or True]
    assert statuses(fetch(["hf:a/h"], tmp_path)).count("failed") == 1
    (request,) = requests_for(["hf:a/h"], tmp_path)
    assert not is_present(request, Manifest())
    assert statuses(fetch(["hf:a/h"], tmp_path, verify=True)) == [
        "failed", "present", "present",
    ]  # fmt: skip
    fetch(["hf:a/h"], tmp_path)
    assert is_present(request, Manifest())
    for more, status in (((), "present"), (("--overwrite",), "planned")):
        told = chatbind("hf:a/h", "--dry-run", *more, "-o", str(tmp_path))
        assert json.loads(told.stdout)["status"] == status


def test_files_that_came_out_and_are_gone_are_unpacked_again(server, tmp_path):
    server.files["/b.zip"] = zipped(one=b"1", two=b"2")
    fetch([f"{server.url}/b.zip"], tmp_path, unpack=True)
    (tmp_path / "one").unlink()
    (record,) = fetch([f"{server.url}/b.zip"], tmp_path, unpack=True)
    assert record["status"] == "downloaded"
    assert (tmp_path / "one").read_bytes() == b"1"


def test_an_archive_that_breaks_while_it_is_unpacked_is_not_present_after_that(server, tmp_path):
    url = f"{server.url}/b.zip"
    server.files["/b.zip"] = zipped(one=b"1" * 50, two=b"2" * 50)
    fetch([url], tmp_path, unpack=True)
    broken = bytearray(zipped(one=b"3" * 50, two=b"4" * 50))
    broken[broken.index(b"4" * 50)] ^= 1
    server.files["/b.zip"] = bytes(broken)
    (record,) = fetch([url], tmp_path, unpack=True, overwrite=True)
    assert record["status"] == "failed"
    assert statuses(fetch([url], tmp_path, unpack=True)) == ["failed"]


def test_the_same_archive_of_a_new_commit_is_not_fetched_again(server, tmp_path):
    server.add_repo("a/s", {"i.zip": zipped(one=b"1")}, kind="datasets")
    fetch(["hf:datasets/a/s"], tmp_path, unpack=True)
    asked = len(server.gets("/content/datasets/a/s/i.zip"))
    notes = tmp_path / "s" / MANIFEST
    notes.write_text(notes.read_text().replace("c" * 40, "d" * 40))
    assert statuses(fetch(["hf:datasets/a/s"], tmp_path, unpack=True)) == ["present"]
    assert len(server.gets("/content/datasets/a/s/i.zip")) == asked


def test_a_failed_overwrite_leaves_what_was_there(server, tmp_path):
    server.add_repo("a/w", {"w.bin": b"good"})
    fetch(["hf:a/w"], tmp_path)
    server.faults["/content/models/a/w/w.bin"] += [
        lambda handler: handler.plain(404) or True for _ in range(9)
    ]
    assert statuses(fetch(["hf:a/w"], tmp_path, overwrite=True)) == ["failed"]
    assert (tmp_path / "w/w.bin").read_bytes() == b"good"


def test_archives_of_a_repository_are_unpacked_where_they_lie(server, tmp_path):
    server.add_repo("a/s", {"sub/i.zip": zipped(one=b"1")}, kind="datasets")
    fetch(["hf:datasets/a/s"], tmp_path, unpack=True)
    assert (tmp_path / "s/sub/one").read_bytes() == b"1"


def test_a_begun_file_counts_for_the_room_that_is_needed(server, tmp_path, monkeypatch):
    from types import SimpleNamespace

    server.files["/f"] = data = bytes(1000)
    (tmp_path / "f.part").write_bytes(data[:900])
    (tmp_path / "f.part.json").write_text("{}")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=300))
    request = Request(name="f", path=tmp_path / "f", url=f"{server.url}/f", bytes=1000)
    list(Downloader().fetch_all([request]))
    assert len(server.gets("/f")) == 1  # not refused before anything is asked for


def test_a_file_in_the_way_of_the_part_is_left_alone(server, tmp_path):
    server.files["/k"] = b"data"
    (tmp_path / "k.part").write_bytes(b"somebody's")
    (record,) = fetch([f"{server.url}/k"], tmp_path)
    assert record["status"] == "failed"
    assert "not begun here" in record["error"]
    assert (tmp_path / "k.part").read_bytes() == b"somebody's"


def test_secrets_of_a_url_are_in_no_record_note_or_file(server, tmp_path, capfd):
    server.files["/k"] = b"data"
    host = server.url.removeprefix("http://")
    words = [f"http://me:pass-word@{host}/k?token=tok-en&v=1", f"http://me:pass-word@{host}/no"]
    records = fetch(words, tmp_path)
    assert statuses(records) == ["downloaded", "failed"]
    assert "v=1" in records[0]["source"] + records[1]["source"]
    text = json.dumps(records) + "".join(capfd.readouterr())
    text += "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    assert "pass-word" not in text and "tok-en" not in text


def test_a_tar_is_a_tar_even_if_a_zip_ends_it(tmp_path):
    (tmp_path / "x.tar").write_bytes(tarred(("a", b"1"), ("in.zip", zipped(evil=b"2"))))
    assert len(unpack(tmp_path / "x.tar", tmp_path / "out")) == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "in.zip"}


def test_of_several_members_of_a_name_the_last_counts(server, tmp_path):
    server.files["/t.tar"] = tarred(("a", b"first"), ("b", b"x"), ("a", b"second one"))
    url = f"{server.url}/t.tar"
    (record,) = fetch([url], tmp_path, unpack=True)
    assert record["files"] == 2
    assert (tmp_path / "a").read_bytes() == b"second one"
    assert statuses(fetch([url], tmp_path, unpack=True, verify=True)) == ["present"]


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("there", [b"mine", b"123456"])
def test_a_file_of_somebody_else_is_not_replaced(tmp_path, kind, there):
    files = {"a.txt": b"aaaaaa", "notes.txt": b"654321"}
    data = zipped(**files) if kind == "zip" else tarred(*files.items())
    (tmp_path / "x").write_bytes(data)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_bytes(there)
    with pytest.raises(DownloadError, match=r"would replace.*--overwrite"):
        unpack(tmp_path / "x", tmp_path / "out")
    assert (tmp_path / "out/notes.txt").read_bytes() == there
    with pytest.raises(DownloadError, match="would replace"):
        unpack(tmp_path / "x", tmp_path / "out", replaceable={"a.txt"})
    assert (tmp_path / "out/notes.txt").read_bytes() == there
    unpack(tmp_path / "x", tmp_path / "out", replaceable={"notes.txt"})
    assert (tmp_path / "out/notes.txt").read_bytes() == b"654321"


def test_a_link_at_the_temporary_name_is_not_followed(tmp_path):
    (tmp_path / "x").write_bytes(zipped(a=b"1"))
    (tmp_path / "out").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/a").write_bytes(b"safe")
    (tmp_path / ".x.unpacking").symlink_to(tmp_path / "outside")
    unpack(tmp_path / "x", tmp_path / "out")
    assert (tmp_path / "outside/a").read_bytes() == b"safe"
    assert (tmp_path / "out/a").read_bytes() == b"1"


@pytest.mark.parametrize(
    "name", [MANIFEST, MANIFEST.upper(), RECORD, "g.zip", ".g.zip.unpacking", ".cache/x"]
)
def test_a_member_cannot_take_the_place_of_our_notes(server, tmp_path, name):
    server.files["/g.zip"] = zipped(**{"fine": b"1", name: b"2"})
    (record,) = fetch([f"{server.url}/g.zip"], tmp_path, unpack=True)
    assert record["status"] == "failed"
    assert "kept for notes" in record["error"] or "would replace others" in record["error"]
    assert not (tmp_path / "fine").exists()


def test_a_damaged_xz_fails_alone(server, tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        info = tarfile.TarInfo("a")
        info.size = 100_000
        archive.addfile(info, io.BytesIO(bytes(range(250)) * 400))
    broken = bytearray(buffer.getvalue())
    broken[len(broken) // 2] ^= 0xFF
    server.files.update({"/t.tar.xz": bytes(broken), "/f": b"1"})
    records = fetch([f"{server.url}/t.tar.xz", f"{server.url}/f"], tmp_path, unpack=True)
    assert statuses(records) == ["downloaded", "failed"]


def test_an_undecodable_name_can_be_verified(server, tmp_path):
    server.files["/t.tar"] = tarred(("caf\udce9", b"x"))
    url = f"{server.url}/t.tar"
    assert statuses(fetch([url], tmp_path, unpack=True)) == ["downloaded"]
    (tmp_path / "caf\udce9").unlink()
    (record,) = fetch([url], tmp_path, unpack=True, verify=True)
    json.dumps(record, ensure_ascii=False).encode("utf-8")
    assert "caf" in record["error"]


def test_a_folder_of_version_0_1_is_known_and_unpacked_again(server, tmp_path):
    server.files["/b.zip"] = data = zipped(one=b"1", two=b"22")
    facts = {"source": f"{server.url}/b.zip", "bytes": len(data), "git_sha1": "0" * 40}
    notes = [
        {"path": "b.zip", **facts, "state": "wanted"},
        {"path": "b.zip", **facts, "state": "here", "sha256": hashlib.sha256(data).hexdigest()},
        {"path": "b.zip", **facts, "state": "unpacked", "files": 2},
    ]
    (tmp_path / MANIFEST).write_text("".join(json.dumps(note) + "\n" for note in notes))
    (tmp_path / "one").write_bytes(b"1")
    words = [f"{server.url}/b.zip"]
    (record,) = fetch(words, tmp_path, unpack=True, verify=True)
    assert "not known" in record["error"] and "--overwrite" in record["error"]
    assert statuses(fetch(words, tmp_path, unpack=True)) == ["downloaded"]
    assert (tmp_path / "two").read_bytes() == b"22"
    assert statuses(fetch(words, tmp_path, unpack=True, verify=True)) == ["present"]


def test_notes_grow_by_whole_lines_and_survive_half_ones(tmp_path):
    first = ManifestEntry(path="a", source="s", state="here", bytes=1)
    second = ManifestEntry(path="b", source="s", state="here", bytes=2)
    Manifest().add(tmp_path, [first])
    with (tmp_path / MANIFEST).open("a") as file:
        file.write('{"path": "d", "state": "here"}\n{"path": "c", "sour')
    assert Manifest().below(tmp_path) == {"a": first}
    Manifest().add(tmp_path, [second, first])
    assert Manifest().below(tmp_path) == {"a": first, "b": second}
    assert len((tmp_path / MANIFEST).read_text().splitlines()) == 4


def test_a_folder_that_cannot_be_made_fails_in_a_record(server, tmp_path):
    server.files["/f"] = b"1"
    (tmp_path / "file").write_bytes(b"")
    (record,) = fetch([f"{server.url}/f"], tmp_path / "file")
    assert record["status"] == "failed"


def test_hub_references_say_whose_notes_they_are_in(tmp_path):
    request = Request(name="n", path=tmp_path / "a/b/w", hub=HubRef(repo="o/n", file="b/w"))
    Manifest().add(tmp_path / "a", [ManifestEntry(path="b/w", source="hf:o/n/b/w", state="here")])
    found = Manifest().of(request)
    assert found is not None and found.path == "b/w"
    assert Path(tmp_path / "a" / MANIFEST).is_file()


def test_verify_keeps_to_the_patterns_and_needs_no_unpack(server, tmp_path):
    server.add_repo("a/s", {"i.zip": zipped(one=b"1"), "d.json": b"[]"}, kind="datasets")
    fetch(["hf:datasets/a/s"], tmp_path, unpack=True)
    assert statuses(fetch(["hf:datasets/a/s"], tmp_path, verify=True)) == ["present"] * 2
    (tmp_path / "s/d.json").unlink()
    (request,) = requests_for(["hf:datasets/a/s"], tmp_path, include=["*.zip"])
    verifier = Downloader(verify=True)
    assert statuses(verifier.fetch_all([request])) == ["present"]
    (tmp_path / "s/one").unlink()
    verifier = Downloader(verify=True)
    assert statuses(verifier.fetch_all([request])) == ["failed"]

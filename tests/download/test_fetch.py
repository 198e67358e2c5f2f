import hashlib
import io
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from chatbind_cli.download.fetch import Downloader
from chatbind_cli.download.requests import HubRef, Request
from chatbind_cli.errors import ChatBindError
from tests.download.calling import zipped

DATA = bytes(range(256)) * 100
SHA256 = hashlib.sha256(DATA).hexdigest()


def url_request(server, path, **kwargs):
    if "sha256" in kwargs:
        kwargs["checksum"] = ("sha256", kwargs.pop("sha256"))
    return Request(name="n", path=path, url=f"{server.url}/{path.name}", **kwargs)


def test_each_file_gets_a_record_that_says_what_it_is(server, tmp_path):
    server.files["/f"] = DATA
    request = url_request(server, tmp_path / "f", sha256=SHA256, bytes=len(DATA))
    expected = {
        "name": "n",
        "path": str(tmp_path / "f"),
        "bytes": len(DATA),
        "sha256": SHA256,
        "source": f"{server.url}/f",
        "status": "downloaded",
    }
    assert list(Downloader().fetch_all([request])) == [expected]
    asked = len(server.requests)
    assert list(Downloader().fetch_all([request])) == [{**expected, "status": "present"}]
    assert len(server.requests) == asked


def test_a_file_of_another_size_is_fetched_again(server, tmp_path):
    server.files["/f"] = DATA
    request = url_request(server, tmp_path / "f", bytes=len(DATA))
    list(Downloader().fetch_all([request]))
    (tmp_path / "f").write_bytes(b"old")
    (record,) = Downloader().fetch_all([request])
    assert record["status"] == "downloaded"
    assert (tmp_path / "f").read_bytes() == DATA


def test_one_failure_stops_nothing_else(server, tmp_path):
    server.files.update({"/a": DATA, "/c": DATA})
    requests = [url_request(server, tmp_path / name) for name in "abc"]
    records = {Path(r["path"]).name: r for r in Downloader().fetch_all(requests)}
    assert [records[name]["status"] for name in "abc"] == ["downloaded", "failed", "downloaded"]
    assert "404" in records["b"]["error"]


def test_a_repository_becomes_a_record_a_file_from_one_commit(server, tmp_path):
    server.add_repo("owner/name", {"config.json": b"{}", "sub/w.bin": DATA})
    request = Request(name="n", path=tmp_path / "x", hub=HubRef(repo="owner/name"))
    records = {r["path"]: r for r in Downloader().fetch_all([request])}
    assert {path: r["status"] for path, r in records.items()} == {
        str(tmp_path / "x/config.json"): "downloaded",
        str(tmp_path / "x/sub/w.bin"): "downloaded",
    }
    source = records[str(tmp_path / "x/sub/w.bin")]["source"]
    assert source == f"hf:owner/name@{'c' * 40}/sub/w.bin"
    again = list(Downloader().fetch_all([request]))
    assert {record["status"] for record in again} == {"present"}


def test_a_hub_file_that_is_not_what_the_hub_says_is_refused_and_removed(server, tmp_path):
    server.add_repo("owner/name", {"w.bin": DATA})
    request = Request(
        name="n",
        path=tmp_path / "w.bin",
        hub=HubRef(repo="owner/name", file="w.bin"),
        checksum=("sha256", "0" * 64),
    )
    (record,) = Downloader().fetch_all([request])
    assert record["status"] == "failed"
    assert "SHA-256" in record["error"]
    assert not (tmp_path / "w.bin").exists()


def test_a_single_hub_file_is_held_to_the_hash_that_the_hub_lists(server, tmp_path, monkeypatch):
    from chatbind_cli.download import hub

    server.add_repo("owner/name", {"w.bin": DATA})
    ref = HubRef(repo="owner/name", file="w.bin")
    request = Request(name="n", path=tmp_path / "w.bin", hub=ref)
    (record,) = Downloader().fetch_all([request])
    assert record["sha256"] == SHA256
    (tmp_path / "w.bin").unlink()
    lying = replace(request, bytes=len(DATA), checksum=("sha256", "0" * 64))
    monkeypatch.setattr(hub.Hub, "files", lambda self, request: [lying])
    (record,) = Downloader().fetch_all([request])
    assert record["status"] == "failed"
    assert "SHA-256" in record["error"]


def test_a_hub_listing_that_names_a_path_outside_is_refused(server, tmp_path):
    server.add_repo("owner/name", {"../../evil.bin": DATA})
    request = Request(name="n", path=tmp_path / "in/x", hub=HubRef(repo="owner/name"))
    (record,) = Downloader().fetch_all([request])
    assert record["status"] == "failed"
    assert "outside" in record["error"]


def test_a_repository_cannot_bring_our_own_notes(server, tmp_path):
    server.add_repo("owner/name", {"w.bin": DATA, ".downloads.jsonl": b"{}", ".cache/x": b"1"})
    request = Request(name="n", path=tmp_path / "x", hub=HubRef(repo="owner/name"))
    (record,) = Downloader().fetch_all([request])
    assert record["path"] == str(tmp_path / "x/w.bin")
    assert b"w.bin" in (tmp_path / "x/.downloads.jsonl").read_bytes()


@pytest.mark.parametrize("keep", [False, True])
def test_an_archive_is_unpacked_once_and_remembered(server, tmp_path, keep):
    server.files["/i.zip"] = zipped(**{"1.jpg": b"1", "d/2.jpg": b"2"})
    request = url_request(server, tmp_path / "i.zip", unpack=tmp_path / "images")
    (record,) = Downloader(keep_archive=keep).fetch_all([request])
    assert record["path"] == str(tmp_path / "images")
    assert record["files"] == 2
    assert (tmp_path / "images/d/2.jpg").read_bytes() == b"2"
    assert (tmp_path / "i.zip").exists() == keep
    asked = len(server.requests)
    (again,) = Downloader().fetch_all([request])
    assert again == {**record, "status": "present"}
    assert len(server.requests) == asked


def test_verify_fetches_nothing_and_finds_what_rotted(server, tmp_path):
    server.files["/f"] = DATA
    good = url_request(server, tmp_path / "f", sha256=SHA256)
    missing = url_request(server, tmp_path / "g", sha256=SHA256)
    list(Downloader().fetch_all([good]))
    asked = len(server.requests)
    statuses = [r["status"] for r in Downloader(verify=True).fetch_all([good])]
    assert statuses == ["present"]
    assert [r["compared"] for r in Downloader(verify=True).fetch_all([good])] == ["sha256"]
    (tmp_path / "f").write_bytes(DATA[::-1])
    for record in Downloader(verify=True).fetch_all([good, missing]):
        assert record["status"] == "failed"
    assert len(server.requests) == asked


def rot(path):
    """Changes a byte as a failing disk does it: size and time of change stay."""
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_verify_trusts_no_remembered_hash(server, tmp_path, monkeypatch):
    monkeypatch.setattr("chatbind_cli.files._CACHED_FROM_BYTES", 1)
    server.files["/f"] = DATA
    request = url_request(server, tmp_path / "f", sha256=SHA256)
    list(Downloader().fetch_all([request]))
    rot(tmp_path / "f")
    (trusting,) = Downloader().fetch_all([request])
    assert trusting["status"] == "present"
    (record,) = Downloader(verify=True).fetch_all([request])
    assert record["status"] == "failed"
    assert "SHA-256" in record["error"]
    # Now that it is known to be wrong, it is fetched again.
    (record,) = Downloader().fetch_all([request])
    assert record["status"] == "downloaded"
    assert (tmp_path / "f").read_bytes() == DATA


def test_a_file_of_the_right_size_and_the_wrong_content_is_fetched_again(server, tmp_path, capfd):
    server.files["/f"] = DATA
    request = url_request(server, tmp_path / "f", bytes=len(DATA), sha256=SHA256)
    list(Downloader().fetch_all([request]))
    (tmp_path / "f").write_bytes(DATA[::-1])
    (record,) = Downloader().fetch_all([request])
    assert record["status"] == "downloaded"
    assert record["sha256"] == SHA256
    assert "not as it should be" in capfd.readouterr().err


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["url", "repository"])
def test_a_file_that_did_not_come_by_download_is_not_replaced(server, tmp_path, kind, overwrite):
    server.files["/w.bin"] = DATA
    server.add_repo("owner/name", {"w.bin": DATA, "other": b"1"})
    request = url_request(server, tmp_path / "w.bin", sha256=SHA256)
    if kind == "repository":
        request = Request(name="n", path=tmp_path, hub=HubRef(repo="owner/name"))
    (tmp_path / "w.bin").write_bytes(b"mine")
    for _ in range(2):
        records = list(Downloader(overwrite=overwrite).fetch_all([request]))
        (failed,) = (record for record in records if record["status"] == "failed")
        assert "did not come by `chatbind download`" in failed["error"]
        assert (tmp_path / "w.bin").read_bytes() == b"mine"
    (tmp_path / "w.bin").unlink()
    records = list(Downloader(overwrite=overwrite).fetch_all([request]))
    assert "failed" not in {record["status"] for record in records}


def test_a_kill_before_the_last_word_about_a_file_leaves_one_that_can_be_replaced(
    server, tmp_path, monkeypatch
):
    server.files["/f"] = DATA
    request = url_request(server, tmp_path / "f")

    def killed(*words, **options):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("chatbind_cli.download.manifest.sha256_file", killed)
        (record,) = Downloader().fetch_all([request])
        assert record["status"] == "failed"
    assert (tmp_path / "f").read_bytes() == DATA
    (record,) = Downloader(overwrite=True).fetch_all([request])
    assert record["status"] == "downloaded"


def test_verify_holds_a_repository_to_what_the_hub_said_without_asking_it_again(server, tmp_path):
    server.add_repo("owner/name", {"config.json": b"{}", "sub/w.bin": DATA})
    request = Request(name="n", path=tmp_path / "x", hub=HubRef(repo="owner/name"))
    fetched = {r["path"]: r for r in Downloader().fetch_all([request])}
    asked = len(server.requests)
    for path, record in {
        r["path"]: r for r in Downloader(verify=True).fetch_all([request])
    }.items():
        assert record == {**fetched[path], "status": "present", "compared": "sha256"}
    rot(tmp_path / "x/sub/w.bin")
    (tmp_path / "x/config.json").unlink()
    errors = [r["error"] for r in Downloader(verify=True).fetch_all([request])]
    assert len(errors) == 2
    assert any("is not here" in error for error in errors)
    assert any("SHA-256" in error for error in errors)
    assert len(server.requests) == asked
    again = list(Downloader().fetch_all([request]))
    assert {record["status"] for record in again} == {"downloaded"}
    assert (tmp_path / "x/sub/w.bin").read_bytes() == DATA


@pytest.mark.parametrize("damage", ["rot", "cut", "unlink"])
def test_verify_reads_what_came_out_of_an_archive(server, tmp_path, damage):
    server.files["/i.zip"] = zipped(**{"1.jpg": b"one", "d/2.jpg": b"two"})
    request = url_request(server, tmp_path / "i.zip", unpack=tmp_path / "images")
    list(Downloader().fetch_all([request]))
    (record,) = Downloader(verify=True).fetch_all([request])
    assert (record["status"], record["files"], record["compared"]) == ("present", 2, "crc32")
    harmed = tmp_path / "images/d/2.jpg"
    {"rot": rot, "cut": lambda path: path.write_bytes(b"t"), "unlink": Path.unlink}[damage](harmed)
    (record,) = Downloader(verify=True).fetch_all([request])
    assert record["status"] == "failed"
    assert "1 of 2 files" in record["error"] and "d/2.jpg" in record["error"]
    (record,) = Downloader(overwrite=True).fetch_all([request])
    assert record["status"] == "downloaded"
    assert harmed.read_bytes() == b"two"


def test_the_members_of_a_tar_are_noted_too_however_often_it_is_begun(server, tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in ("a", "b"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(name.encode() * 3))
    server.files["/i.tgz"] = buffer.getvalue()
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a").write_bytes(b"aaa")
    request = url_request(server, tmp_path / "i.tgz", unpack=tmp_path / "images")
    list(Downloader().fetch_all([request]))
    (record,) = Downloader(verify=True).fetch_all([request])
    assert record["status"] == "present"
    rot(tmp_path / "images/a")
    (record,) = Downloader(verify=True).fetch_all([request])
    assert "another content" in record["error"]


def test_two_processes_do_not_unpack_one_archive(server, tmp_path):
    server.files["/i.zip"] = zipped(**{"1.jpg": b"one"})
    request = url_request(server, tmp_path / "i.zip", unpack=tmp_path / "images")
    (tmp_path / "i.zip").write_bytes(server.files["/i.zip"])
    holder = (
        "import fcntl, sys; f = open(sys.argv[1], 'rb'); fcntl.flock(f, fcntl.LOCK_EX)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", holder, str(tmp_path / "i.zip")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        (record,) = Downloader().fetch_all([request])
        assert record["status"] == "failed"
        assert "another process" in record["error"]
        other.communicate()
    (record,) = Downloader().fetch_all([request])
    assert record["files"] == 1


def test_overwrite_fetches_what_is_here(server, tmp_path):
    server.add_repo("owner/name", {"config.json": b"{}"})
    server.files["/f"] = DATA
    requests = [
        Request(name="n", path=tmp_path / "x", hub=HubRef(repo="owner/name")),
        url_request(server, tmp_path / "f"),
    ]
    for overwrite, status in ((False, "downloaded"), (False, "present"), (True, "downloaded")):
        records = Downloader(overwrite=overwrite).fetch_all(requests)
        assert {record["status"] for record in records} == {status}


def test_what_cannot_fit_is_refused_before_anything_is_asked_for(server, tmp_path):
    request = url_request(server, tmp_path / "f", bytes=10**18)
    with pytest.raises(ChatBindError, match="make room"):
        list(Downloader().fetch_all([request]))
    assert server.requests == []


@pytest.mark.parametrize("kind", ["url", "hub", "archive"])
def test_a_disk_that_is_full_all_the_same_is_a_failed_record(server, tmp_path, monkeypatch, kind):
    def full(*words, **options):
        raise OSError(28, "No space left on device")

    server.files["/i.zip"] = zipped(**{"1.jpg": b"1"})
    server.add_repo("owner/name", {"w.bin": DATA})
    request = url_request(server, tmp_path / "i.zip")
    if kind == "hub":
        request = Request(name="n", path=tmp_path / "x", hub=HubRef(repo="owner/name"))
        monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    elif kind == "archive":
        request = replace(request, unpack=tmp_path / "images")
        monkeypatch.setattr("chatbind_cli.download.archive._crc32_of", full)
    else:
        monkeypatch.setattr("chatbind_cli.download.web._begin", full)
    (record,) = Downloader().fetch_all([request])
    assert "No space left" in record["error"] and "make room" in record["error"]


def test_leaving_early_stops_the_workers(server, fault, tmp_path):
    for number in range(20):
        server.files[f"/{number}"] = DATA
    requests = [url_request(server, tmp_path / str(number)) for number in range(20)]
    records = Downloader(max_workers=1).fetch_all(requests)
    next(records)
    records.close()
    assert len(list(tmp_path.iterdir())) < 20

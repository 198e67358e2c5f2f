import gzip
import hashlib
import random
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import httpx
import pytest

from chatbind_cli.download import web
from chatbind_cli.download.requests import Request
from chatbind_cli.download.web import fetch_url, open_client
from chatbind_cli.errors import ChatBindError, DownloadError

DATA = random.Random(0).randbytes(3_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def client():
    with open_client() as client:
        yield client


def fetch(client, server, path, name="/f", **kwargs):
    waits = []
    for kind in ("sha256", "md5"):
        if kind in kwargs:
            kwargs["checksum"] = (kind, kwargs.pop(kind))
    request = Request(name="n", path=path, url=server.url + name, **kwargs)
    with mock.patch.object(web, "time", SimpleNamespace(sleep=waits.append)):
        fetch_url(client, request)
    return waits


def leftovers(folder):
    return sorted(file.name for file in folder.iterdir())


def test_a_file_appears_whole_and_leaves_nothing_beside_it(client, server, tmp_path):
    server.files["/f"] = DATA
    fetch(client, server, tmp_path / "sub/f", bytes=len(DATA), sha256=SHA256.upper())
    assert (tmp_path / "sub/f").read_bytes() == DATA
    assert leftovers(tmp_path / "sub") == ["f"]


def test_a_body_cut_short_goes_on_by_range_where_it_stopped(client, server, fault, tmp_path):
    server.files["/f"] = DATA
    server.faults["/f"] += [fault.cut(1_000_000), fault.cut(2_000_000)]
    fetch(client, server, tmp_path / "f", sha256=SHA256)
    assert (tmp_path / "f").read_bytes() == DATA
    ranges = [headers.get("Range") for headers in server.gets("/f")]
    assert ranges[0] is None
    assert ranges[1:] == ["bytes=1000000-", "bytes=2000000-"]


def test_a_next_call_goes_on_with_what_a_failed_one_left(client, server, fault, tmp_path):
    server.files["/f"] = DATA
    server.faults["/f"] += [fault.cut(1_500_000)] + [fault.status(503)] * 3
    with pytest.raises(DownloadError, match=r"the server says 503.*run the same command again"):
        fetch(client, server, tmp_path / "f")
    assert leftovers(tmp_path) == ["f.part", "f.part.json"]
    fetch(client, server, tmp_path / "f", sha256=SHA256)
    assert server.gets("/f")[-1]["Range"] == "bytes=1500000-"
    assert leftovers(tmp_path) == ["f"]


def test_a_file_that_changed_in_between_is_fetched_anew(client, server, fault, tmp_path):
    server.files["/f"] = DATA
    server.faults["/f"] += [fault.cut(1_500_000)] + [fault.status(503)] * 3
    with pytest.raises(DownloadError):
        fetch(client, server, tmp_path / "f")
    server.files["/f"] = DATA[::-1]
    fetch(client, server, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA[::-1]


def test_without_a_validator_nothing_is_pieced_together(client, server, fault, tmp_path):
    server.etags = False
    server.files["/f"] = DATA
    server.faults["/f"] += [fault.cut(1_500_000)]
    fetch(client, server, tmp_path / "f", sha256=SHA256)
    assert all("Range" not in headers for headers in server.gets("/f"))


def test_a_server_without_ranges_is_asked_for_all_of_it_again(client, server, fault, tmp_path):
    server.ranges = False
    server.files["/f"] = DATA
    server.faults["/f"] += [fault.cut(1_500_000)]
    fetch(client, server, tmp_path / "f", sha256=SHA256)
    assert (tmp_path / "f").read_bytes() == DATA


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_busy_servers_are_asked_again(client, server, fault, tmp_path, status):
    server.files["/f"] = DATA
    server.faults["/f"] += [fault.status(status)] * 2
    waits = fetch(client, server, tmp_path / "f")
    assert len(waits) == 2
    assert waits[0] < waits[1] * 2


def test_retry_after_is_heeded_up_to_the_limit(client, server, fault, tmp_path):
    server.files["/f"] = DATA
    server.faults["/f"] += [
        fault.status(429, Retry_After="3"),
        fault.status(429, Retry_After="9999"),
    ]
    assert fetch(client, server, tmp_path / "f") == [3.0, web._LONGEST_WAIT_S]


def test_a_body_that_is_compressed_all_the_same_is_unpacked(client, server, fault, tmp_path):
    server.files["/f"] = DATA
    body = gzip.compress(DATA, 1)

    def squeeze(handler, sent=None):
        handler.send_response(200)
        handler.send_header("ETag", '"gz"')
        handler.send_header("Content-Encoding", "gzip")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[:sent])
        handler.close_connection = True
        return True

    server.faults["/f"] += [lambda handler: squeeze(handler, 1_000_000), squeeze]
    fetch(client, server, tmp_path / "f", sha256=SHA256)
    assert (tmp_path / "f").read_bytes() == DATA
    assert leftovers(tmp_path) == ["f"]
    assert all("Range" not in headers for headers in server.gets("/f"))


def answers(handler, status, headers, body):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)
    handler.wfile.flush()
    handler.close_connection = True
    return True


FIRST = {"ETag": '"one"', "Last-Modified": "Mon, 02 Nov 2026 10:00:00 GMT"}


@pytest.mark.parametrize(
    "change",
    [
        {"ETag": '"two"'},
        {"Content-Range": "bytes 1000-2999999/4000000"},
        {"Content-Range": "bytes 0-2999999/3000000"},
        {"Content-Range": "bytes \u00b2-2999999/3000000"},
        {"Content-Range": f"bytes {'1' * 5000}-2999999/3000000"},
        {"Content-Encoding": "gzip"},
    ],
)
def test_a_part_of_another_version_is_never_glued_on(client, server, fault, tmp_path, change):
    def first(handler):
        head = {**FIRST, "Content-Length": str(len(DATA))}
        return answers(handler, 200, head, DATA[:1000])

    def second(handler):
        # as a server that does not heed If-Range
        head = {**FIRST, "Content-Range": f"bytes 1000-2999999/{len(DATA)}"} | change
        return answers(handler, 206, head, b"x" * (len(DATA) - 1000))

    server.files["/f"] = DATA
    server.faults["/f"] += [first, second]
    fetch(client, server, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA
    _, second_, third = server.gets("/f")
    assert second_["Range"] == "bytes=1000-"
    assert second_["If-Range"] == '"one"'
    assert "Range" not in third


def test_a_body_is_as_long_as_was_told_at_most(client, server, fault, tmp_path, monkeypatch):
    def endless(handler):
        return answers(handler, 200, {}, bytes(3_000_000))

    def more(handler):
        head = {**FIRST, "Content-Range": f"bytes 1000-2999999/{len(DATA)}"}
        return answers(handler, 206, head, bytes(len(DATA)))

    server.files["/f"] = DATA
    server.faults["/f"] += [endless]
    with pytest.raises(DownloadError, match=r"has more than 0\.00 MB; do not trust it"):
        fetch(client, server, tmp_path / "f", bytes=1000)
    assert leftovers(tmp_path) == []
    monkeypatch.setattr("chatbind_cli.download.web._MOST_UNTOLD_BYTES", 1_000_000)
    server.faults["/f"] += [endless]
    with pytest.raises(DownloadError, match=r"more than 1\.00 MB; do not trust it"):
        fetch(client, server, tmp_path / "f")
    bomb = gzip.compress(bytes(50_000_000))
    server.faults["/f"] += [
        lambda handler: answers(handler, 200, {"Content-Encoding": "gzip"}, bomb)
    ]
    with pytest.raises(DownloadError, match=r"more than 1\.00 MB"):
        fetch(client, server, tmp_path / "f")
    server.faults["/f"] += [lambda handler: answers(handler, 200, {"Content-Encoding": "br"}, b"")]
    with pytest.raises(DownloadError, match="comes compressed as 'br', unasked"):
        fetch(client, server, tmp_path / "f")
    head = {**FIRST, "Content-Length": str(len(DATA))}
    server.faults["/f"] += [lambda handler: answers(handler, 200, head, DATA[:1000]), more]
    with pytest.raises(DownloadError, match=r"has more than 3\.00 MB"):
        fetch(client, server, tmp_path / "f")


@pytest.mark.parametrize("value", ["\u00b2", "9" * 5000, "-1", "1e9", "Mon, 99 Foo 2026"])
def test_a_retry_after_of_nonsense_is_passed_over(client, server, fault, tmp_path, value):
    server.files["/f"] = DATA
    server.faults["/f"] += [
        lambda handler: answers(handler, 429, {"Retry-After": value, "Content-Length": "0"}, b"")
    ]
    [wait] = fetch(client, server, tmp_path / "f")
    assert wait < 1


@pytest.mark.parametrize(
    "location",
    ["http://[::1", "http://127.0.0.1:99999/x", "http://\u00ff.\ud7ff/", "file:///etc/x"],
)
def test_a_redirect_to_nowhere_is_one_line(client, server, fault, tmp_path, location):
    server.files["/f"] = DATA
    server.faults["/f"] += [
        lambda handler: answers(
            handler, 302, {"Location": location.encode().decode("latin-1")}, b""
        )
    ] * 5
    with pytest.raises(DownloadError, match="fetched") as error:
        fetch(client, server, tmp_path / "f")
    assert "\n" not in str(error.value)


def test_a_server_that_stalls_is_given_up_after_some_tries(client, server, fault, tmp_path):
    server.files["/f"] = DATA
    server.faults["/f"] += [fault.stall(1.0)] * 5
    start = time.monotonic()
    with pytest.raises(DownloadError, match="does not answer"):
        fetch(client, server, tmp_path / "f")
    assert time.monotonic() - start < 3
    assert len(server.gets("/f")) == web._TRIES_IN_VAIN


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "login"), (403, "does not let you"), (404, "check the URL")]
)
def test_a_refusal_is_final_and_says_what_to_do(client, server, fault, tmp_path, status, hint):
    server.files["/f"] = DATA
    server.faults["/f"] += [fault.status(status)]
    with pytest.raises(DownloadError, match=rf"says {status} .*{hint}"):
        fetch(client, server, tmp_path / "f")
    assert len(server.gets("/f")) == 1


def test_a_wrong_digest_names_both_and_keeps_nothing(client, server, tmp_path):
    server.files["/f"] = DATA
    with pytest.raises(DownloadError, match=rf"SHA-256 {SHA256[:12]}.* in place of 000000000000"):
        fetch(client, server, tmp_path / "f", sha256="0" * 64)
    assert leftovers(tmp_path) == []


def test_a_wrong_size_keeps_nothing(client, server, tmp_path):
    server.files["/f"] = DATA
    with pytest.raises(DownloadError, match="3000000 bytes in place of 5"):
        fetch(client, server, tmp_path / "f", bytes=5)
    assert leftovers(tmp_path) == []


def test_md5_is_checked_where_nothing_better_is_known(client, server, tmp_path):
    server.files["/f"] = DATA
    fetch(client, server, tmp_path / "f", md5=hashlib.md5(DATA).hexdigest())
    with pytest.raises(DownloadError, match="MD5"):
        fetch(client, server, tmp_path / "g", md5="0" * 32)


def test_redirects_are_followed_but_not_to_other_protocols(client, server, fault, tmp_path):
    server.files["/real"] = DATA
    server.files["/f"] = b"never"
    server.faults["/f"] += [fault.status(302, Location="/real")]
    fetch(client, server, tmp_path / "f", sha256=SHA256)
    server.faults["/f"] += [fault.status(302, Location="file:///etc/passwd")]
    with pytest.raises(DownloadError, match="cannot be fetched"):
        fetch(client, server, tmp_path / "g")


def test_no_room_is_said_before_the_disk_is_full(client, server, tmp_path, monkeypatch):
    server.files["/f"] = DATA
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(ChatBindError, match=r"needs 3\.00 MB and 1\.00 MB are free.*make room"):
        fetch(client, server, tmp_path / "f")
    assert (tmp_path / "f.part").stat().st_size == 0


def test_no_connection_is_one_line(client, tmp_path):
    with pytest.raises(
        DownloadError, match=r"^http://127\.0\.0\.1:9/f: could not be fetched"
    ) as error:
        request = Request(name="n", path=tmp_path / "f", url="http://127.0.0.1:9/f")
        fetch_url(client, request)
    assert "\n" not in str(error.value)


def test_another_process_at_the_same_file_is_noticed(server, tmp_path, client):
    server.files["/f"] = DATA
    import fcntl

    with (tmp_path / "f.part").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ChatBindError, match="another process"):
            fetch(client, server, tmp_path / "f")


KILLED = """
import sys
from pathlib import Path
from chatbind_cli.download import web
from chatbind_cli.download.requests import Request
from chatbind_cli.download.web import fetch_url, open_client
left = int(sys.argv[3])
def advance(n):
    global left
    left -= n
    if left <= 0:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
with open_client() as client:
    request = Request(name="n", path=Path(sys.argv[2]), url=sys.argv[1])
    fetch_url(client, request, advance=advance)
"""


def test_a_killed_fetch_is_resumed_to_the_same_bytes(client, server, tmp_path):
    server.files["/f"] = DATA * 3
    for kill_at in (1, 2_500_000, 3_500_000):
        arguments = [server.url + "/f", str(tmp_path / "f"), str(kill_at)]
        done = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
        assert done.returncode == -9
        assert leftovers(tmp_path) == ["f.part", "f.part.json"]
    fetch(client, server, tmp_path / "f", sha256=hashlib.sha256(DATA * 3).hexdigest())
    begins = [int(h["Range"][6:-1]) for h in server.gets("/f") if "Range" in h]
    assert begins == sorted(begins)
    assert begins[-1] > 3_000_000


def test_the_client_asks_for_uncompressed_bodies(client, server, tmp_path):
    server.files["/f"] = DATA
    fetch(client, server, tmp_path / "f")
    assert server.gets("/f")[0]["Accept-Encoding"] == "identity"
    assert isinstance(client, httpx.Client)

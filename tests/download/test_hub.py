import hashlib
import os
import subprocess
import sys

import pytest

from chatbind_cli.download.hub import Hub
from chatbind_cli.download.wanted import HubRef, parse_hub_ref
from chatbind_cli.errors import DownloadError

WEIGHTS = bytes(range(256)) * 2000
FILES = {
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": WEIGHTS,
    "tf_model.h5": b"no",
    ".gitattributes": b"no",
    "sub/tokenizer.json": b"[]",
}


@pytest.fixture
def hub(server):
    server.add_repo("owner/name", FILES)
    server.add_repo("owner/bins", {"pytorch_model.bin": WEIGHTS, "a.msgpack": b"no"})
    server.add_repo("owner/set", {"d.json": b"[1]"}, kind="datasets")
    return Hub(server.url)


def test_a_listing_leaves_copies_for_other_programs_out(hub):
    files, commit = hub.files(HubRef(repo="owner/name"))
    assert {file.path for file in files} == {
        "config.json",
        "model.safetensors",
        "sub/tokenizer.json",
    }
    assert commit == "c" * 40
    weights = next(file for file in files if file.path == "model.safetensors")
    assert weights.bytes == len(WEIGHTS)
    assert weights.sha256 == hashlib.sha256(WEIGHTS).hexdigest()


def test_bins_are_wanted_where_there_is_nothing_better(hub):
    files, _ = hub.files(HubRef(repo="owner/bins"))
    assert [file.path for file in files] == ["pytorch_model.bin"]


def test_patterns_choose_exactly(hub):
    files, _ = hub.files(HubRef(repo="owner/name"), ["*.h5"])
    assert [file.path for file in files] == ["tf_model.h5"]


@pytest.mark.parametrize(
    "word", ["hf:owner/name/sub/tokenizer.json", "hf:datasets/owner/set/d.json"]
)
def test_a_file_lands_under_its_path(hub, tmp_path, word):
    ref = parse_hub_ref(word)
    seen = []
    path = hub.fetch(ref, tmp_path, advance=seen.append)
    assert path == tmp_path / ref.file
    assert path.read_bytes() in (b"[]", b"[1]")
    assert sum(seen) == path.stat().st_size


def test_the_hubs_own_bar_draws_nothing(hub, tmp_path, capfd):
    hub.fetch(HubRef(repo="owner/name", file="model.safetensors"), tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (HubRef(repo="no/body", file="f"), "there is no such repository, or it is not open"),
        (HubRef(repo="owner/name", file="nothing.bin"), "there is no such file"),
    ],
)
def test_what_is_not_there_is_one_line(hub, tmp_path, ref, message):
    with pytest.raises(DownloadError, match=message) as error:
        hub.fetch(ref, tmp_path)
    assert "\n" not in str(error.value)


def test_a_gated_repository_says_where_to_ask_and_how_to_log_in(hub, server, tmp_path):
    server.gated.add("models/owner/gated")
    with pytest.raises(DownloadError, match=r"owner/gated, then log in with `hf auth login`"):
        hub.fetch(HubRef(repo="owner/gated", file="f"), tmp_path)


def test_a_revision_that_is_not_there_is_named(hub):
    with pytest.raises(DownloadError, match="no revision 'nowhere'"):
        hub.files(HubRef(repo="owner/name", revision="nowhere"))


def test_an_unreachable_hub_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the hub's library waits 23 s
    hub = Hub("http://127.0.0.1:9")
    for call in (
        lambda: hub.files(HubRef(repo="a/b")),
        lambda: hub.fetch(HubRef(repo="a/b", file="f"), tmp_path),
    ):
        with pytest.raises(DownloadError, match="hf:a/b") as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("status", "hint"), [(401, "hf auth login"), (403, "may not read")])
def test_a_refused_token_says_what_to_do(hub, server, fault, status, hint):
    server.faults["/api/models/owner/name"] += [fault.status(status)]
    with pytest.raises(DownloadError, match=hint):
        hub.files(HubRef(repo="owner/name"))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again_for_its_listing(hub, server, fault, monkeypatch, status):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    server.faults["/api/models/owner/bins"] += [fault.status(status)] * 3
    files, _ = hub.files(HubRef(repo="owner/bins"))
    assert [file.path for file in files] == ["pytorch_model.bin"]
    assert waits == sorted(waits)
    server.faults["/api/models/owner/name"] += [fault.status(status)] * 4
    with pytest.raises(DownloadError, match=f"the hub says {status}"):
        hub.files(HubRef(repo="owner/name"))


def test_a_repository_is_listed_once(hub, server):
    for _ in range(2):
        hub.files(HubRef(repo="owner/name"))
        facts = hub.file(HubRef(repo="owner/name", file="model.safetensors"))
        assert facts.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert hub.file(HubRef(repo="owner/name", file="nothing")) is None
    assert len(server.gets("/api/models/owner/name")) == 1


SNAPSHOT = """
from chatbind_cli.download.hub import fetch_snapshot
print(fetch_snapshot("owner/name"))
"""


def test_a_snapshot_goes_to_the_hubs_cache_and_is_found_there_offline(hub, server, tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": server.url}

    def snapshot(**extra):
        return subprocess.run(
            [sys.executable, "-c", SNAPSHOT],
            env=environment | extra,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout.strip()

    folder = snapshot()
    assert folder.startswith(str(tmp_path))
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "sub"]
    asked = len(server.requests)
    assert snapshot(HF_HUB_OFFLINE="1") == folder
    assert len(server.requests) == asked

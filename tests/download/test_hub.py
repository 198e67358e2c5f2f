import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from chatbind_cli.download.hub import Hub
from chatbind_cli.download.requests import HubRef, Request, parse_hub_ref
from chatbind_cli.errors import DownloadError
from tests.download.calling import chatbind

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
    return Hub()


def listed(hub, word, include=()):
    request = Request(name="n", path=Path("here"), hub=parse_hub_ref(word), include=tuple(include))
    return {str(file.path.relative_to("here")): file for file in hub.files(request)}


def test_a_listing_leaves_copies_for_other_programs_out(hub):
    files = listed(hub, "hf:owner/name")
    assert set(files) == {"config.json", "model.safetensors", "sub/tokenizer.json"}
    weights = files["model.safetensors"]
    assert weights.source == f"hf:owner/name@{'c' * 40}/model.safetensors"
    assert weights.bytes == len(WEIGHTS)
    assert weights.checksum == ("sha256", hashlib.sha256(WEIGHTS).hexdigest())


def test_bins_are_wanted_where_there_is_nothing_better(hub):
    assert list(listed(hub, "hf:owner/bins")) == ["pytorch_model.bin"]


def test_patterns_choose_exactly(hub):
    assert list(listed(hub, "hf:owner/name", ["*.h5"])) == ["tf_model.h5"]


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
        listed(hub, "hf:owner/name@nowhere")


def test_an_unreachable_hub_is_one_line(hub_at, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the hub's library waits 23 s
    hub_at("http://127.0.0.1:9")
    hub = Hub()
    for call in (
        lambda: listed(hub, "hf:a/b"),
        lambda: hub.fetch(HubRef(repo="a/b", file="f"), tmp_path),
    ):
        with pytest.raises(DownloadError, match=r"hf:a/b(/f)?: cannot be reached") as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("status", "hint"), [(401, "hf auth login"), (403, "may not read")])
def test_a_refused_token_says_what_to_do(hub, server, fault, status, hint):
    server.faults["/api/models/owner/name"] += [fault.status(status)]
    with pytest.raises(DownloadError, match=hint):
        listed(hub, "hf:owner/name")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again_for_its_listing(hub, server, fault, monkeypatch, status):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    server.faults["/api/models/owner/bins"] += [fault.status(status)] * 3
    assert list(listed(hub, "hf:owner/bins")) == ["pytorch_model.bin"]
    assert waits == sorted(waits)
    server.faults["/api/models/owner/name"] += [fault.status(status)] * 4
    with pytest.raises(DownloadError, match=f"the hub says {status}"):
        listed(hub, "hf:owner/name")


def test_a_repository_is_listed_once(hub, server):
    for _ in range(2):
        listed(hub, "hf:owner/name")
        request = Request(name="n", path=Path("x"), hub=parse_hub_ref("hf:owner/name/config.json"))
        (file,) = hub.files(request)
        assert file.checksum == ("git-sha1", hashlib.sha1(b"blob 2\0{}").hexdigest())
        missing = replace(request, hub=parse_hub_ref("hf:owner/name/nothing"))
        assert hub.files(missing) == []
    assert len(server.gets("/api/models/owner/name")) == 1


SNAPSHOT = """
from chatbind_cli.download.hub import fetch_snapshot
from chatbind_cli.download.requests import HubRef
print(fetch_snapshot(HubRef(repo="owner/name")))
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


def test_a_file_of_the_hub_goes_on_by_range_where_it_was_cut_off(hub, server, fault, tmp_path):
    large = os.urandom(12_000_000)  # the hub's library keeps blocks of ten million bytes
    server.add_repo("owner/large", {"w.bin": large})
    content = "/content/models/owner/large/w.bin"
    server.files[content] = large
    server.faults[content] += [fault.cut(11_000_000)]
    assert hub.fetch(HubRef(repo="owner/large", file="w.bin"), tmp_path).read_bytes() == large
    first, second = [headers.get("Range", "") for headers in server.gets(content)]
    assert first == ""
    assert int(second.removeprefix("bytes=").split("-")[0]) >= 10_000_000


STALLED = """
import sys
from pathlib import Path
from chatbind_cli.download.hub import Hub
from chatbind_cli.download.requests import HubRef
ref = HubRef(repo="owner/name", file="model.safetensors")
print(Hub().fetch(ref, Path(sys.argv[1])))
"""


def test_a_hub_that_stalls_is_asked_again(hub, server, fault, tmp_path):
    content = "/content/models/owner/name/model.safetensors"
    server.faults[content] += [fault.stall(3)]
    done = subprocess.run(
        [sys.executable, "-c", STALLED, str(tmp_path)],
        env={**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_DOWNLOAD_TIMEOUT": "1"},
        check=True,
        capture_output=True,
        timeout=60,
    )
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS, done.stderr
    assert len(server.gets(content)) == 2


def test_the_token_goes_to_the_hub_and_to_nobody_else(hub, server, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    listed(hub, "hf:owner/name")
    hub.fetch(HubRef(repo="owner/name", file="model.safetensors"), tmp_path)
    sent = {path: headers.get("authorization") for _, path, headers in server.requests}
    assert sent["/api/models/owner/name"] == "Bearer hf_secretsecret"
    assert sent["/content/models/owner/name/model.safetensors"] is None
    assert "secret" not in "".join(capfd.readouterr())
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or b"secret" not in file.read_bytes()


def fetch_words(folder, *words, **options):
    return chatbind(*words, "-o", str(folder), **options)


def statuses(result):
    return [json.loads(line)["status"] for line in result.stdout.splitlines()]


def test_without_a_network_what_is_here_is_present(hub, server, tmp_path):
    away = {"offline": True, "cache": tmp_path / "home"}
    assert fetch_words(tmp_path, "hf:owner/name").returncode == 0
    asked = len(server.requests)
    again = fetch_words(tmp_path, "hf:owner/name", **away)
    assert again.returncode == 0, again.stderr
    assert statuses(again) == ["present"] * 3
    elsewhere = fetch_words(tmp_path / "b", "hf:owner/name", **away)
    assert elsewhere.returncode == 1
    assert "HF_HUB_OFFLINE is set" in elsewhere.stderr
    assert len(server.requests) == asked


def test_without_a_network_the_hubs_cache_is_copied_from_if_it_has_all(hub, server, tmp_path):
    away = {"offline": True, "cache": tmp_path / "home/hub"}
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url}
    environment = {**os.environ, **home}
    subprocess.run([sys.executable, "-c", SNAPSHOT], env=environment, check=True)
    asked = len(server.requests)
    words = ("hf:owner/name", "hf:owner/name/config.json")
    for word in words:
        copied = fetch_words(tmp_path / "a", word, **away)
        assert copied.returncode == 0, copied.stderr
    folder = tmp_path / "a/name"
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert not (folder / "model.safetensors").is_symlink()
    assert (folder / "sub/tokenizer.json").read_bytes() == b"[]"
    for link in (tmp_path / "home").rglob("model.safetensors"):
        link.unlink()
    part = fetch_words(tmp_path / "b", "hf:owner/name", **away)
    assert part.returncode == 1
    assert "not all of it" in part.stderr
    assert not (tmp_path / "b").exists()
    assert len(server.requests) == asked


def test_a_repository_killed_at_any_moment_is_resumed_to_the_same_files(server, fault, tmp_path):
    import random

    weights = {f"w{number}.bin": os.urandom(1_500_000) for number in range(3)}
    server.add_repo("owner/big", {"config.json": b"{}", **weights})
    generator = random.Random(0)
    for round_ in range(3):
        folder = tmp_path / str(round_)
        for name in weights:
            server.faults[f"/content/models/owner/big/{name}"] += [fault.drip(100_000, 0.02)]
        process = subprocess.Popen(
            [sys.executable, "-m", "chatbind_cli", "download", "hf:owner/big", "-o", str(folder)],
            env={**os.environ, "HF_ENDPOINT": server.url},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not folder.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.5))
        process.kill()
        process.wait()
        for name in weights:
            server.faults[f"/content/models/owner/big/{name}"].clear()
        again = fetch_words(folder, "hf:owner/big")
        assert again.returncode == 0, again.stderr
        for name, data in weights.items():
            assert (folder / "big" / name).read_bytes() == data

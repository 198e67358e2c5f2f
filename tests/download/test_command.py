import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import pytest

from chatbind_cli.download.catalogue import entries
from tests.download.calling import chatbind, zipped
from tests.terminal import on_a_terminal


def records(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_list_gives_a_record_an_entry_and_says_what_is_here(tmp_path):
    folder = tmp_path / "checkpoints/vicuna-7b"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    half = tmp_path / "checkpoints/llama-7b"
    half.mkdir()
    (half / "w-1.safetensors").touch()
    index = {"weight_map": {"a": "w-1.safetensors", "b": "w-2.safetensors"}}
    (half / "model.safetensors.index.json").write_text(json.dumps(index))
    listed = records(chatbind("--list", "-o", str(tmp_path)))
    assert [record["name"] for record in listed] == list(entries())
    assert [record["name"] for record in listed if record["present"]] == ["vicuna-7b"]


def test_plan_and_dry_run_say_what_would_come_and_touch_no_network(hub_at, tmp_path):
    hub_at("http://127.0.0.1:9")
    result = chatbind("--plan", "review", "--dry-run", "-o", str(tmp_path))
    assert result.returncode == 0
    assert {record["name"] for record in records(result)} == {"coco-val2014", "llava-eval-90"}
    assert {record["status"] for record in records(result)} == {"planned"}
    assert list(tmp_path.iterdir()) == []


def test_some_failures_are_exit_3_all_are_exit_1_and_nothing_asked_is_exit_2(server, tmp_path):
    server.files["/f"] = b"data"
    some = chatbind(server.url + "/f", server.url + "/g", "-o", str(tmp_path))
    assert some.returncode == 3
    assert sorted(record["status"] for record in records(some)) == ["downloaded", "failed"]
    everything = chatbind(server.url + "/g", "-o", str(tmp_path))
    assert everything.returncode == 1
    assert everything.stderr.count("\n") == 1
    assert "404" in everything.stderr
    assert chatbind().returncode == 2
    assert chatbind("vicuna7b").returncode == 2


def test_a_hub_repository_comes_from_hf_endpoint(server, tmp_path):
    server.add_repo("owner/name", {"config.json": b"{}"})
    words = [sys.executable, "-m", "chatbind_cli", "download", "hf:owner/name", "-o", str(tmp_path)]
    environment = {**os.environ, "HF_ENDPOINT": server.url}
    result = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "name/config.json").read_bytes() == b"{}"
    assert result.stderr == ""


def test_unpack_takes_archives_of_urls_and_of_the_hub_apart(server, tmp_path):
    server.files.update({"/a.zip": zipped(one=b"1"), "/b.bin": b"no archive"})
    server.add_repo("owner/set", {"c.zip": zipped(two=b"2"), "d.json": b"[]"}, kind="datasets")
    words = [server.url + "/a.zip", server.url + "/b.bin", "hf:datasets/owner/set"]
    words += ["-o", str(tmp_path)]
    first = chatbind(*words, "--unpack")
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "one").read_bytes() == b"1"
    assert (tmp_path / "set/two").read_bytes() == b"2"
    assert (tmp_path / "b.bin").exists() and (tmp_path / "set/d.json").exists()
    assert not (tmp_path / "a.zip").exists() and not (tmp_path / "set/c.zip").exists()
    for more in ((), ("--verify",)):
        again = chatbind(*words, "--unpack", *more)
        assert again.returncode == 0, again.stderr
        assert {record["status"] for record in records(again)} == {"present"}
    assert chatbind(*words, "--verify", "--overwrite").returncode == 2


def test_catalogue_entries_land_where_the_catalogue_says(server, tmp_path):
    pictures = zipped(**{"GCC_train_0.jpg": b"a", "GCC_train_1.jpg": b"b"})
    files = {"chat.json": b"[]", "metadata.json": b"[]", "images.zip": pictures}
    server.add_repo("liuhaotian/LLaVA-CC3M-Pretrain-595K", files, kind="datasets")
    shards = {"pytorch_model.bin": b"w", "config.json": b"{}", "flax_model.msgpack": b"no"}
    server.add_repo("lmsys/vicuna-7b-v1.1", shards)
    server.gated.add("models/huggyllama/llama-7b")
    server.add_repo("huggyllama/llama-7b", {"model.safetensors": b"w", "config.json": b"{}"})
    names = ("cc3m-595k", "vicuna-7b")
    words = [*names, "-o", str(tmp_path)]
    done = chatbind(*words)
    assert done.returncode == 0, done.stderr
    assert {record["name"] for record in records(done)} == set(names)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert found >= {
        "data/cc3m-595k/chat.json",
        "data/cc3m-595k/metadata.json",
        "data/cc3m-595k/images/GCC_train_1.jpg",
        "checkpoints/vicuna-7b/pytorch_model.bin",
    }
    assert not any(path.endswith((".zip", ".msgpack")) for path in found)
    listed = records(chatbind("--list", "-o", str(tmp_path)))
    assert {record["name"] for record in listed if record["present"]} == set(names)
    raw = [path for _, path, _ in server.requests if "/raw/" in path]
    assert raw == []
    gated = chatbind("llama-7b", "-o", str(tmp_path))
    assert gated.returncode == 1
    assert gated.stderr.count("\n") == 1
    assert "huggyllama/llama-7b" in gated.stderr and "hf auth login" in gated.stderr


def test_evil_archives_are_one_line_at_the_shell_and_nothing_is_written(server, tmp_path):
    link = io.BytesIO()
    with zipfile.ZipFile(link, "w") as made:
        info = zipfile.ZipInfo("door")
        info.external_attr = 0o120777 << 16
        made.writestr(info, "/etc/passwd")
    bomb = bytearray(zipped(bomb=b"small"))  # says that it unpacks to 2 GiB
    at = bomb.rindex(b"PK\x01\x02") + 24
    bomb[at : at + 4] = (2 << 30).to_bytes(4, "little")
    path = zipped(**{"fine": b"1", "../evil": b"2"})
    evil = {"path.zip": path, "link.zip": link.getvalue(), "bomb.zip": bytes(bomb)}
    server.files.update({f"/{name}": data for name, data in evil.items()})
    for name in evil:
        folder = tmp_path / name / "in"
        done = chatbind(f"{server.url}/{name}", "--unpack", "-o", str(folder))
        assert done.returncode == 1
        assert [record["status"] for record in records(done)] == ["failed"]
        assert done.stderr.count("error:") == 1 and "do not trust it" in done.stderr
        assert {path.name for path in folder.iterdir()} == {name, ".downloads.jsonl"}
        assert not (tmp_path / name / "evil").exists()


def test_on_a_terminal_downloading_and_unpacking_have_bars(server, tmp_path):
    server.files["/many.zip"] = zipped(**{f"{number}": b"x" for number in range(4000)})
    words = [sys.executable, "-m", "chatbind_cli", "download", server.url + "/many.zip"]
    code, shown = on_a_terminal([*words, "--unpack", "-o", str(tmp_path)])
    assert code == 0
    assert b"downloading" in shown and b"unpacking many.zip" in shown
    lines = [line for line in shown.splitlines() if b"downloaded " in line]
    assert len(lines) == 1 and str(tmp_path).encode() in shown, shown[-2000:]


def test_patterns_and_hashes_are_kept_to(server, tmp_path):
    server.add_repo("owner/name", {"a.json": b"{}", "b.json": b"{}", "w.bin": b"w"})
    server.files["/f"] = b"data"
    words = ["hf:owner/name", "--include", "a.*", "--include", "w.*", "-o", str(tmp_path)]
    assert chatbind(*words).returncode == 0
    found = {path.name for path in (tmp_path / "name").glob("*.*")}
    assert found == {"a.json", "w.bin", ".cache", ".downloads.jsonl"}
    wrong = chatbind(f"{server.url}/f#sha256={'0' * 64}", "-o", str(tmp_path))
    assert wrong.returncode == 1 and "SHA-256" in wrong.stderr
    assert not (tmp_path / "f").exists()
    right = hashlib.sha256(b"data").hexdigest()
    assert chatbind(f"{server.url}/f#sha256={right}", "-o", str(tmp_path)).returncode == 0


def test_ctrl_c_ends_soon_and_the_same_command_goes_on(server, fault, tmp_path):
    data = os.urandom(2_000_000)
    server.files["/f"] = data

    def drip(handler):
        handler.send_response(200)
        handler.send_header("ETag", '"slow"')
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        for start in range(0, len(data), 20_000):
            handler.wfile.write(data[start : start + 20_000])
            time.sleep(0.05)
        return True

    server.faults["/f"].append(drip)
    words = [
        sys.executable,
        "-m",
        "chatbind_cli",
        "download",
        server.url + "/f",
        "-o",
        str(tmp_path),
    ]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    part = tmp_path / "f.part"
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size > 50_000) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 130
    assert out == b""
    assert part.exists()
    assert chatbind(server.url + "/f", "-o", str(tmp_path)).returncode == 0
    assert (tmp_path / "f").read_bytes() == data


def test_ctrl_c_does_not_wait_for_a_server_that_stalls(server, fault, tmp_path):
    server.files["/f"] = b"data"
    server.faults["/f"].append(fault.stall(60))
    words = [sys.executable, "-m", "chatbind_cli", "download", server.url + "/f"]
    process = subprocess.Popen(
        [*words, "-o", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 20
    while not server.gets("/f") and time.monotonic() < deadline:
        time.sleep(0.02)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert time.monotonic() - begin < 10
    assert b"Traceback" not in errors


def test_catalogue_names_are_completed():
    completed = subprocess.run(
        [sys.executable, "-m", "chatbind_cli"],
        env={
            **os.environ,
            "_CHATBIND_COMPLETE": "bash_complete",
            "COMP_WORDS": "chatbind download llava-i",
            "COMP_CWORD": "2",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert "llava-instruct-150k" in completed.stdout
    assert "vicuna" not in completed.stdout


@pytest.mark.parametrize("words", [("--list",), ("imagebind-huge", "--dry-run")])
def test_looking_loads_nothing_heavy(words):
    probe = (
        "import sys\nfrom chatbind_cli.cli import run\n"
        f"run(['download', *{list(words)!r}])\n"
        "heavy = {'torch', 'httpx', 'huggingface_hub', 'transformers'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

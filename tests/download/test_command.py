import json
import os
import signal
import subprocess
import sys
import time

import pytest

from chatbind_cli.download.catalogue import entries


def chatbind(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "chatbind_cli", "download", *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def records(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_list_gives_a_record_an_entry_and_says_what_is_here(tmp_path):
    folder = tmp_path / "checkpoints/vicuna-7b"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    listed = records(chatbind("--list", "-o", str(tmp_path)))
    assert [record["name"] for record in listed] == list(entries())
    assert [record["name"] for record in listed if record["present"]] == ["vicuna-7b"]


def test_plan_and_dry_run_say_what_would_come_and_touch_no_network(tmp_path):
    result = chatbind(
        "--plan", "review", "--dry-run", "-o", str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9"
    )
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
    result = chatbind("hf:owner/name", "-o", str(tmp_path), HF_ENDPOINT=server.url)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "name/config.json").read_bytes() == b"{}"
    assert result.stderr == ""


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


@pytest.mark.parametrize("words", [("--help",), ("--list",), ("imagebind-huge", "--dry-run")])
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

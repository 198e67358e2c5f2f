import json

import pytest

from chatbind_cli import doctor
from chatbind_cli.cli import run
from chatbind_cli.doctor import NOTE, OK, PROBLEM
from chatbind_cli.media.modality import MODALITIES


def records(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_where_the_suite_runs_the_main_job_can_run(tmp_path, capsys):
    assert run(["doctor", "--json", "--no-network", "-o", str(tmp_path)]) == (0, "")
    found = {(r["area"], r["name"]): r for r in records(capsys)}
    assert {name for area, name in found if area == "media"} == set(MODALITIES)
    assert all(r["status"] == OK for (area, _), r in found.items() if area == "media")
    assert "float32" in found["device", "cpu"]["value"]
    assert found["attention", "sdpa"]["status"] == OK
    assert found["package", "torch"]["value"].startswith("2.")
    assert found["room", "disk"]["value"].endswith("GB free")
    assert not any(area == "hub" for area, _ in found)


@pytest.mark.parametrize("version", ["1.13.1", None])
def test_a_package_that_does_not_fit_is_a_problem_and_exit_1(monkeypatch, capsys, version):
    plain = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: version if name == "torch" else plain(name)
    )
    code, message = run(["doctor", "--no-network"])
    assert code == 1
    assert message.startswith("chatbind: error: 1 problem(s) keep this machine")
    assert "package torch" in message
    assert "\n" not in message
    found = records(capsys)
    assert not any(record["area"] == "media" for record in found)
    assert any(record["status"] == PROBLEM for record in found)


def test_a_package_that_does_not_load_says_why(monkeypatch):
    def fail(name):
        raise OSError(f"undefined symbol in {name}")

    monkeypatch.setattr("importlib.import_module", fail)
    (torch,) = [record for record in doctor.packages() if record["name"] == "torch"]
    assert torch["status"] == PROBLEM
    assert "does not load (undefined symbol in torch)" in torch["value"]


def test_an_extra_built_for_another_pytorch_is_a_note(monkeypatch):
    import importlib

    def load(name):
        if name == "flash_attn":
            raise ImportError("undefined symbol: _ZN3c10")
        return importlib.__import__(name)

    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: version(name) or "9.9")
    monkeypatch.setattr("importlib.import_module", load)
    found = {record["name"]: record for record in doctor.packages()}
    assert found["flash-attn"]["status"] == NOTE
    assert "9.9 does not load (undefined symbol: _ZN3c10)" in found["flash-attn"]["value"]


def test_media_that_cannot_be_read_are_a_problem(monkeypatch):
    monkeypatch.setattr(
        "chatbind_cli.toy.media.media_bytes", lambda item, modality, seed: b"broken"
    )
    found = list(doctor.decoders())
    assert {record["area"] for record in found} == {"media"}
    assert {record["status"] for record in found} == {PROBLEM}


def test_no_token_and_no_password_is_ever_shown(monkeypatch):
    secrets = ("hf_secret", "pass-word")
    monkeypatch.setenv("HF_TOKEN", secrets[0])
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://me:{secrets[1]}@127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    found = list(doctor.hub())
    assert [record["status"] for record in found] == [NOTE, NOTE]
    assert "http://127.0.0.1:9 does not answer" in found[0]["value"]
    assert "there is one" in found[1]["value"]
    assert not any(secret in str(found) for secret in secrets)

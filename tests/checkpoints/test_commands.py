import io
import json
import os

import pytest
import torch

from chatbind_cli.cli import run


def records(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def folders(make):
    base, target = make("b", make.llama(0)), make("t", make.llama(1, projector=True))
    return str(base), str(target)


@pytest.mark.parametrize("style", ["--base {} --target {} --delta {}", "seed"])
def test_make_and_apply_end_with_artefact_records(folders, tmp_path, capsys, style):
    base, target = folders
    words = style.replace("seed", "--base-model-path {} --target_model_path {} --delta-path {}")
    assert run(["make-delta", *words.format(base, target, tmp_path / "d").split()])[0] == 0
    (record,) = records(capsys)
    assert record["artifact"] == "delta"
    assert record["path"] == str(tmp_path / "d")
    words = words.format(base, tmp_path / "t2", tmp_path / "d").split()
    assert run(["apply-delta", *words])[0] == 0
    (record,) = records(capsys)
    assert record["artifact"] == "target"
    assert record["made_by"] == "apply-delta"
    manifest = json.loads((tmp_path / "t2/chatbind_weights.json").read_text())
    assert record["sha256"] == manifest["sha256"]
    assert run(["apply-delta", "--verify", str(tmp_path / "t2")])[0] == 0
    assert records(capsys)[0]["sha256"] == record["sha256"]


def test_refusals_are_exit_1_and_misuse_is_exit_2(folders, tmp_path):
    base, target = folders
    code, message = run(
        ["apply-delta", "--base", target, "--delta", base, "--target", str(tmp_path / "x")]
    )
    assert code == 1
    assert message.startswith("chatbind: error: ")
    assert "\n" not in message
    assert run(["apply-delta", "--base", base])[0] == 2
    assert (
        run(["apply-delta", "--base", str(tmp_path / "no"), "--delta", base, "--target", "x"])[0]
        == 2
    )
    assert run(["extract-projector", "-o", "x.bin"])[0] == 2
    no_delta = ["apply-delta", "--base", base, "--delta", "./no", "--target", str(tmp_path / "x")]
    assert run(no_delta)[0] == 2


def test_extract_projector_speaks_the_seeds_words_and_takes_a_record(
    folders, tmp_path, capsys, monkeypatch
):
    _, target = folders
    out = tmp_path / "deep/p.bin"
    assert run(["extract-projector", "--model_name_or_path", target, "--output", str(out)])[0] == 0
    (record,) = records(capsys)
    assert (record["artifact"], record["path"]) == ("projector", str(out))
    lines = json.dumps({"step": 1}) + "\n" + json.dumps({"artifact": "checkpoint", "path": target})
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert run(["extract-projector", "-", "-o", str(tmp_path / "q.safetensors")])[0] == 0
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"step": 1}\n')))
    code, message = run(["extract-projector", "-", "-o", str(tmp_path / "r.safetensors")])
    assert code == 1
    assert "did not finish" in message


def test_a_mistyped_path_is_not_looked_for_on_the_hub(folders, tmp_path, hub_at, monkeypatch):
    base, target = folders
    monkeypatch.chdir(tmp_path)
    hub_at("http://127.0.0.1:9")
    (tmp_path / "checkpoints").mkdir()
    for name in ("base", "delta"):
        words = {"base": base, "delta": target} | {name: "checkpoints/no"}
        given = [word for key, value in words.items() for word in (f"--{key}", value)]
        code, message = run(["apply-delta", *given, "--target", "x"])
        assert code == 2
        assert "checkpoints/no: no such file or folder" in message


@pytest.mark.parametrize(
    ("which", "word"), [("base", "owner/name"), ("delta", "hf:datasets/owner/name")]
)
def test_a_base_or_delta_on_the_hub_is_downloaded(make, tmp_path, server, monkeypatch, which, word):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    folders = {"base": make("b", make.llama(0)), "delta": make("d", make.llama(1))}
    files = {path.name: path.read_bytes() for path in folders[which].iterdir()}
    server.add_repo("owner/name", files, kind="datasets" if "datasets" in word else "models")
    words = {name: str(folder) for name, folder in folders.items()} | {which: word}
    given = ["--base", words["base"], "--delta", words["delta"], "--target", str(tmp_path / "t")]
    assert run(["apply-delta", *given]) == (0, "")
    manifest = json.loads((tmp_path / "t/chatbind_weights.json").read_text())
    assert manifest[which]["name"] == word
    assert (tmp_path / "t/config.json").exists()


def test_weights_that_would_run_code_are_refused_by_every_command(make, tmp_path):
    folder = make("evil", {"a": torch.ones(1)}, "bin")
    torch.save({"a": Evil(tmp_path / "pwned")}, folder / "pytorch_model.bin")
    good = str(make("b", make.llama(0)))
    for words in (
        ["apply-delta", "--base", good, "--delta", str(folder), "--target", str(tmp_path / "x")],
        ["make-delta", "--base", str(folder), "--target", good, "--delta", str(tmp_path / "x")],
        ["extract-projector", str(folder), "-o", str(tmp_path / "p.safetensors")],
    ):
        code, message = run(words)
        assert code == 1
        assert "could run code" in message
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "x").exists()


def lying_offsets(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["lm_head.weight"]["data_offsets"] = [0, 1 << 40]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def index_outside(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def huge_memo(folder):
    # An unpickler that made room for memo 2 000 000 000 would take 32 GB.
    (folder / "model.safetensors").unlink()
    pickled = b"\x80\x02}r\x00\x94\x35\x77."
    (folder / "pytorch_model.bin").write_bytes(pickled)


@pytest.mark.parametrize("forge", [lying_offsets, index_outside, huge_memo])
def test_forged_weights_are_one_line_in_every_command_and_nothing_is_written(make, tmp_path, forge):
    folder = make("forged", make.llama(0, projector=True), config={"model_type": "llava"})
    forge(folder)
    good = str(make("b", make.llama(0)))
    out = tmp_path / "out"
    for words in (
        ["apply-delta", "--base", good, "--delta", str(folder), "--target", str(out)],
        ["apply-delta", "--base", str(folder), "--delta", good, "--target", str(out)],
        ["make-delta", "--base", good, "--target", str(folder), "--delta", str(out)],
        ["extract-projector", str(folder), "-o", str(out / "p.safetensors")],
        ["convert", str(folder), "-o", str(out)],
    ):
        code, message = run(words)
        assert code == 1, words
        assert message.startswith("chatbind: error: ")
        assert "\n" not in message
        assert sorted(os.listdir(tmp_path)) == ["made"]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))

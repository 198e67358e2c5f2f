"""Hostile model folders: each is one line, nothing of theirs runs, and valid ones still load."""

from __future__ import annotations

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chatbind_cli.checkpoints.projector_file import write_projector
from chatbind_cli.errors import ChatBindError, CheckpointError
from chatbind_cli.model.assemble import build_chatbind
from chatbind_cli.model.config import EncoderInfo
from chatbind_cli.model.loading import ChatBind, projector_of
from chatbind_cli.model.pretrained import open_config, open_model, open_tokenizer
from chatbind_cli.model.tokenizer import TextCodec
from tests.model.tiny import language_model, save_language_model

ROOT = Path(__file__).resolve().parents[2]
ENCODER = EncoderInfo(name="toy", sha256=None, embedding_dim=8)
Spoil = Callable[[Path], object]

CODE = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
EVIL = "from pathlib import Path\nPath('{}').touch()\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("lm") / "lm")


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A copy to spoil, with code beside it that leaves a trace."""
    copy = shutil.copytree(base, tmp_path / "lm")
    (copy / "evil.py").write_text(EVIL.format(tmp_path / "owned"))
    return copy


def change(name: str, **fields: Any) -> Spoil:
    """Sets keys of a JSON file of the folder."""

    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return spoil


def config(**fields: Any) -> Spoil:
    return change("config.json", **fields)


def tokenizer_config(**fields: Any) -> Spoil:
    return change("tokenizer_config.json", **fields)


def tokenizer(*keys: str, value: Any) -> Spoil:
    """Sets one place of tokenizer.json; a list grows by the value."""

    def spoil(folder: Path) -> None:
        path = folder / "tokenizer.json"
        whole = json.loads(path.read_text())
        place = whole
        for key in keys[:-1]:
            place = place[key]
        old = place.get(keys[-1])
        place[keys[-1]] = [*old, value] if isinstance(old, list) else value
        path.write_text(json.dumps(whole))

    return spoil


def content(name: str, data: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(data)


def index(data: bytes) -> Spoil:
    """An index over the one weights file, which is called otherwise."""

    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "m.safetensors")
        (folder / "model.safetensors.index.json").write_bytes(data)

    return spoil


def pickled(value: object) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(value, folder / "pytorch_model.bin")

    return spoil


class Touch:
    """Unpickles to a call: what a malicious file would do."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("true",)


HUGE = {"id": 4_000_000_000, "content": "<z>"}
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}
YARN = {"rope_type": "yarn", "factor": "x"}

HOSTILE: dict[str, tuple[Spoil, str]] = {
    "code": (config(model_type="evil", auto_map=CODE), r"config\.json: needs code of its own"),
    "tokenizer code": (
        tokenizer_config(tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.T", None]}),
        r"tokenizer_config\.json: needs code of its own",
    ),
    "unknown kind": (config(model_type="evil"), "model_type 'evil', which transformers"),
    "no language model": (config(model_type="t5"), "no causal language model"),
    "another kind": (config(model_type="gpt2"), "tensors are missing"),
    "text for a size": (config(hidden_size="x"), "config.json cannot be used.*hidden_size"),
    "negative size": (config(hidden_size=-1), "config.json cannot be used"),
    "huge size": (config(hidden_size=10**9), "describes a larger model than the weights"),
    "huge heads": (config(head_dim=10**9), "describes a larger model than the weights"),
    "huge layers": (config(num_hidden_layers=10**9), "asks for num_hidden_layers = 1e"),
    "many layers": (config(num_hidden_layers=15_000), "describes a larger model than"),
    "fewer than none": (config(num_hidden_layers=-5), "asks for num_hidden_layers = -5"),
    "labels": (config(num_labels=10**9, id2label=None), "asks for num_labels"),
    "huge vocabulary": (config(vocab_size=10**12), "describes a larger model than the weights"),
    "overflow": (config(vocab_size=10**30), "cannot be opened"),
    "other shapes": (config(vocab_size=5), "do not have the shapes that config.json says"),
    "no heads": (config(num_attention_heads=0), "config.json cannot be used"),
    "rope": (config(rope_scaling=YARN), "cannot be opened"),
    "methods": (config(to_dict=5, get_text_config=1), "config.json cannot be used"),
    "quantised": (
        config(quantization_config={"quant_method": "fbgemm_fp8"}),
        "quantised by 'fbgemm_fp8'",
    ),
    "not a number": (
        lambda f: content("config.json", b'{"model_type": "llama", "rms_norm_eps": NaN}')(f),
        "NaN is not a number",
    ),
    "deep config": (content("config.json", b'{"a":' * 100_000), "cannot be read as JSON"),
    "long config": (content("config.json", b'{"a":"' + b"x" * (50 << 20)), "more than"),
    "many brackets": (content("tokenizer.json", b"[" + b"[]," * 2_100_000), "brackets"),
    "no UTF-8": (content("config.json", b'{"a": "\xff"}'), "cannot be read as JSON"),
    "no object": (content("config.json", b"[]"), "is not a JSON object"),
    "generation": (content("generation_config.json", b"[" * 100_000), "cannot be read as JSON"),
    "cut tokenizer": (content("tokenizer.json", b'{"model": {'), "cannot be read as JSON"),
    "empty tokenizer": (content("tokenizer.json", b"{}"), "no usable tokenizer"),
    "huge added id": (tokenizer("added_tokens", value=HUGE), "token id that none has: 4000000000"),
    "huge id": (tokenizer("model", "vocab", "zz", value=4 * 10**9), "token id that none has"),
    "hole": (tokenizer("model", "vocab", "zz", value=10**6), "has ids for 1000001 tokens"),
    "growth": (
        tokenizer("normalizer", value={"type": "Sequence", "normalizers": [DOUBLE] * 40}),
        "makes texts grow",
    ),
    "panic": (tokenizer("normalizer", value=CHARSMAP), "its tokenizer breaks over a text"),
    "merges": (tokenizer("model", "merges", value=["no", "pe"]), "no usable tokenizer"),
    "special tokens": (content("special_tokens_map.json", b"[]"), "is not a JSON object"),
    "end of text": (tokenizer_config(eos_token=5), "no usable tokenizer"),
    "decoder ids": (
        tokenizer_config(added_tokens_decoder={"x": {"content": "a"}}),
        "token id that none has: 'x'",
    ),
    "sentencepiece": (content("tokenizer.model", b"\x0a\xff\xff\xff\x7f" * 99), "SentencePiece"),
    "index of no JSON": (index(b"{"), "cannot be read as JSON"),
    "index of a list": (index(b'{"weight_map": [1]}'), "index has no weight_map"),
    "index outside": (index(b'{"weight_map": {"a": "../m.safetensors"}}'), "outside its folder"),
    "index of missing": (index(b'{"weight_map": {"a": "n.safetensors"}}'), "is missing"),
    "index that lies": (index(b'{"weight_map": {"a": "m.safetensors"}}'), "it is not"),
    "header": (content("model.safetensors", (10**12).to_bytes(8, "little") + b"{"), "header"),
    "pickle of code": (pickled({"a": Touch()}), "loading it could run code; get the weights"),
    "pickle of lists": (pickled({"a": [1]}), "entry 'a' is not a tensor but list"),
}


def build(folder: Path) -> ChatBind:
    bundle = build_chatbind(folder, encoder=ENCODER)
    TextCodec(bundle.tokenizer).plain("a banana", at_start=True)
    return bundle


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_one_line_and_runs_nothing(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = HOSTILE[name]
    spoil(folder)
    with pytest.raises(ChatBindError, match=message) as caught:
        build(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert str(folder) in str(caught.value)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "owned").exists()


LEADS_ELSEWHERE: dict[str, Spoil] = {
    "code with a native class": config(auto_map=CODE),
    "code of another repository": config(auto_map={"AutoConfig": "evil/repo--evil.Config"}),
    "tokenizer code with a native class": tokenizer_config(
        auto_map={"AutoTokenizer": ["e.T", None]}
    ),
    "a kernel of the hub": config(
        attn_implementation="kernels-community/x", _attn_implementation="kernels-community/x"
    ),
    "weights elsewhere": config(transformers_weights="../evil.safetensors"),
    "another config": config(configuration_files=["config.4.0.0.json"]),
    "inputs": tokenizer_config(init_inputs=["/etc/passwd"], vocab_file="/etc/passwd"),
    "an adapter": content("adapter_config.json", b'{"base_model_name_or_path": "evil/base"}'),
    "a distributed checkpoint": lambda folder: shutil.copy(
        folder / "evil.py", folder / "shard-00001-model-00001-of-00001.safetensors"
    ),
    "code for generation": lambda folder: shutil.move(
        folder / "evil.py",
        (folder / "custom_generate").mkdir() or folder / "custom_generate/generate.py",
    ),
}


@pytest.mark.parametrize("name", LEADS_ELSEWHERE)
def test_what_leads_elsewhere_is_left_alone(
    name: str, base: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LEADS_ELSEWHERE[name](folder)

    def connect(*args: object) -> None:
        raise AssertionError("a folder asks the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    before = sorted(folder.rglob("*"))
    model, plain = build(folder).model, build(base).model
    for ours, theirs in zip(
        model.language_model.parameters(), plain.language_model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert sorted(folder.rglob("*")) == before
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("kind", ["qwen2_tied", "mixtral", "gpt_neox", "opt", "bloom", "gpt2"])
def test_every_kind_of_language_model_still_loads(kind: str, tmp_path: Path) -> None:
    folder = save_language_model(tmp_path / "lm", kind)
    model = open_model(folder)
    assert model.name_or_path == str(folder)
    for name, tensor in language_model(kind, model.config.vocab_size).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_tokenizer_remembers_its_own_folder(folder: Path, tmp_path: Path) -> None:
    found = open_tokenizer(folder)
    assert found.name_or_path == str(folder)
    found.save_pretrained(tmp_path / "saved")
    assert "chatbind-" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()


def test_a_name_that_is_no_folder_is_not_looked_for_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*args: object) -> None:
        raise AssertionError("a name asks the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    for name in (tmp_path / "nowhere", "nobody/nothing"):
        for opens in (open_config, open_tokenizer, open_model):
            with pytest.raises(CheckpointError, match="no model folder; .*download hf:OWNER/NAME"):
                opens(name)


def test_nobody_calls_the_library_directly() -> None:
    """One module opens language models that others have made, one encoders; no third door."""
    doors = {"from_pretrained", "from_config", "apply_chat_template", "pipeline"}
    places = ("model/pretrained.py", "encoders/huggingface/repository.py")
    ours = {ROOT / "chatbind_cli" / place for place in places}
    found = []
    for path in [*ROOT.glob("chatbind_cli/**/*.py"), *ROOT.glob("commands/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = ast.unparse(node.func.value)
            called = node.func.attr in doors or owner == "torch.hub"
            if called and path not in ours and owner not in ("Answerer", "cls"):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node.func)}")
    assert found == []


def test_the_command_leaves_stdin_alone(folder: Path, tmp_path: Path) -> None:
    """transformers would ask on stdout, and take a line of the user's records for the answer."""
    write_projector(tmp_path / "p.safetensors", projector_of(build(folder).model))
    config(model_type="evil", auto_map=CODE)(folder)
    (tmp_path / "stdin").write_text("y\n" * 9)
    with (tmp_path / "stdin").open() as stdin:
        projector = str(tmp_path / "p.safetensors")
        words = ["convert", str(folder), "--projector", projector, "-o", str(tmp_path / "out")]
        done = subprocess.run(
            [sys.executable, "-m", "chatbind_cli", *words],
            stdin=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        assert os.lseek(stdin.fileno(), 0, os.SEEK_CUR) == 0
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "config.json: needs code of its own (auto_map)" in line
    assert not (tmp_path / "owned").exists()

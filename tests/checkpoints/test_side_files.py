"""Of what lies beside weights, only what belongs to a model travels."""

from __future__ import annotations

import os

import pytest

from chatbind_cli.cli import run
from chatbind_cli.folders import RECORD

BELONGS = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "qwen.tiktoken",
    "chat_template.jinja",
    "additional_chat_templates/tool.jinja",
    "LICENSE",
    "LICENSE-APACHE-2.0.md",
    "license.txt",
    "NOTICE",
    "USE_POLICY.md",
    "README.md",
]
OTHERS = [
    "passwords.csv",
    "modeling_llama.py",
    "training_args.bin",
    ".env",
    "notes.txt",
    "LICENSE.key",
    "licenses/keys.txt",
    "additional_chat_templates/.secret.jinja",
    "additional_chat_templates/key.pem",
    "trainer_state.json",
]


@pytest.fixture
def folder(make):
    made = make("target", make.llama(1))
    for name in (*BELONGS[1:], *OTHERS):
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_text("{}")
    secret = made.parent / "secret"
    secret.write_text("{}")
    (made / "vocab.json").symlink_to(secret)
    (made / "merges.txt").symlink_to(made / "notes.txt")
    with (made / "tokenizer.model").open("ab") as file:
        file.truncate(65 << 20)
    os.mkfifo(made / "vocab.txt")
    return made


def carried(path):
    names = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    return (
        names
        - {"model.safetensors", "chatbind_weights.json", RECORD}
        - {"chatbind_exact-model.safetensors"}
    )


@pytest.mark.parametrize("source", ["", "/model.safetensors"])
def test_make_delta_and_apply_delta_take_only_what_belongs_to_a_model(
    make, folder, tmp_path, capsys, source
):
    base = make("base", make.llama(0))
    wanted = {*BELONGS, "merges.txt"} - {"tokenizer.model"}  # it is too large to be one
    words = f"make-delta --base {base} --target {folder}{source} --delta {tmp_path / 'd'}"
    assert run(words.split()) == (0, "")
    assert carried(tmp_path / "d") == wanted
    told = [line for line in capsys.readouterr().err.splitlines() if "link out" in line]
    assert len(told) == 1 and "vocab.json is not copied" in told[0]
    words = f"apply-delta --base {base} --delta {folder}{source} --target {tmp_path / 't'}"
    assert run(words.split()) == (0, "")
    assert carried(tmp_path / "t") == wanted


def test_a_weights_file_without_a_config_beside_it_travels_alone(make, folder, tmp_path):
    base = make("base", make.llama(0))
    (folder / "config.json").unlink()
    words = ["--base", str(base), "--delta", str(folder / "model.safetensors")]
    assert run(["apply-delta", *words, "--target", str(tmp_path / "t")]) == (0, "")
    assert carried(tmp_path / "t") == set()


def test_the_links_of_the_hub_s_cache_lead_to_files_of_the_model(make, tmp_path):
    made = make("target", make.llama(1))
    snapshot, blobs = tmp_path / "models--a--b/snapshots/c", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in made.iterdir():
        file.rename(blobs / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-of-{file.name}")
    base = make("base", make.llama(0))
    words = ["--base", str(base), "--delta", str(snapshot), "--target", str(tmp_path / "t")]
    assert run(["apply-delta", *words]) == (0, "")
    assert carried(tmp_path / "t") == {"config.json"}


def test_every_name_that_transformers_saves_a_tokenizer_under_travels():
    import re
    from pathlib import Path

    import transformers

    from chatbind_cli.checkpoints import side_files

    names = set()
    for file in Path(transformers.__file__).parent.glob("models/*/token*.py"):
        for table in re.findall(r"VOCAB_FILES_NAMES\s*=\s*\{(.*?)\}", file.read_text(), re.S):
            names |= set(re.findall(r':\s*"([^"]+)"', table))
    assert "vocab.json" in names
    assert names - side_files._TOKENIZER == set()

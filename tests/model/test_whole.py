"""`convert --language-model`: what other programs open, and what an engine is known by."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatbind_cli.cli import run
from chatbind_cli.errors import ChatBindError, CheckpointError
from chatbind_cli.folders import RECORD, note_made, refuse_foreign
from chatbind_cli.inference.loaded_model import load_model
from chatbind_cli.model.assemble import build_chatbind
from chatbind_cli.model.config import EncoderInfo
from chatbind_cli.model.loading import load_chatbind
from chatbind_cli.model.pretrained import quiet_transformers
from chatbind_cli.model.probe import (
    TOLERANCE,
    Step,
    answer_probe,
    difference,
    probe_embeddings,
    read_probe,
)
from chatbind_cli.model.whole import language_model
from tests.model.tiny import LANGUAGE_MODELS, save_chatbind, save_language_model

ENCODER = EncoderInfo(name="small", sha256="ab" * 32, embedding_dim=8, path="/enc")


@pytest.fixture
def made(tmp_path):
    """`made(kind)`: a ChatBind folder over a language model of that kind."""

    def make(kind="llama"):
        base = save_language_model(tmp_path / f"{kind}-base", kind)
        save_chatbind(build_chatbind(base, encoder=ENCODER), tmp_path / kind)
        return tmp_path / kind

    return make


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_transformers_opens_it_and_it_says_the_same(made, tmp_path, kind):
    source, out = made(kind), tmp_path / "lm"
    language_model(source, out, shard_bytes=20_000)
    assert len(list(out.glob("*.safetensors"))) > 1
    whole = load_chatbind(source)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(out)
        tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.model_type == whole.config.text_config.model_type
    assert tokenizer.get_vocab() == whole.tokenizer.get_vocab()
    assert model.dtype == whole.model.dtype
    embeddings = probe_embeddings(whole.model, whole.tokenizer).unsqueeze(0)
    with torch.inference_mode():
        there = model(inputs_embeds=embeddings).logits
        assert torch.equal(there, whole.model(inputs_embeds=embeddings).logits)
    assert model.generation_config.eos_token_id == whole.model.generation_config.eos_token_id
    assert read_probe(source) == read_probe_in(out) == answer_probe(whole)


def read_probe_in(folder):
    return [Step(**step) for step in json.loads((folder / "engine.json").read_text())["steps"]]


def test_the_model_stays_what_it_is(made, tmp_path):
    source = made()
    before = load_model(source).sha256
    note_made(source, [path.name for path in source.iterdir()], made_by="finetune")
    language_model(source, tmp_path / "lm")
    assert load_model(source).sha256 == before
    refuse_foreign(source, made_by="finetune")  # so it can still be made anew


def test_the_same_again_is_there_already_and_its_note_comes_back(made, tmp_path):
    source, out = made(), tmp_path / "lm"
    first = language_model(source, out)
    noted = (source / "engine.json").read_bytes()
    (source / "engine.json").unlink()
    again = language_model(source, out)
    assert (again.sha256, again.notes) == (first.sha256, ("it is here already",))
    assert (source / "engine.json").read_bytes() == noted
    with pytest.raises(ChatBindError, match="exists already"):
        language_model(source, out, shard_bytes=20_000)
    language_model(source, out, shard_bytes=20_000, overwrite=True)
    assert (out / RECORD).is_file()


def test_where_the_model_cannot_be_written_the_user_is_told(made, tmp_path):
    source = made()
    (source / "engine.json").mkdir()
    [told] = language_model(source, tmp_path / "lm").notes
    assert f"copy {tmp_path / 'lm' / 'engine.json'} there" in told


def test_a_bare_language_model_is_refused_and_nothing_is_written(tmp_path):
    base = save_language_model(tmp_path / "base")
    with pytest.raises(CheckpointError, match="is no ChatBind model"):
        language_model(base, tmp_path / "lm")
    assert not (tmp_path / "lm").exists()


def test_other_weights_in_the_models_place_are_not_those_of_the_note(made, tmp_path):
    source = made()
    language_model(source, tmp_path / "lm")
    shutil.copy(made("gpt2") / "model.safetensors", source)
    with pytest.raises(CheckpointError, match="of other weights"):
        read_probe(source)
    (source / "engine.json").write_text('{"format": 1, "steps": [{"token": 1}]}')
    with pytest.raises(CheckpointError, match="is not what it should be"):
        read_probe(source)


STEPS = [Step(5, -0.5, 6, 2.0), Step(7, -1.0, 8, 0.4), Step(9, -0.1, 3, 4.0)]


@pytest.mark.parametrize(
    ("tokens", "logprobs", "unlike"),
    [
        ([5, 7, 9], [-0.5, -1.0, -0.1], None),
        ([5, 7, 9], [-0.5, -1.0 - 2.9 * TOLERANCE, -0.1], None),
        ([5, 7, 9], [-0.5, -1.0 - 3.1 * TOLERANCE, -0.1], "off by 0.00, 0.31, 0.00"),
        ([5, 8, 1], [-0.5, -1.4, -7.0], None),  # about equally likely
        ([5, 8, 9], [-0.5, -1.0, -0.1], "off by 0.00, 0.40"),
        ([6, 7, 9], [-2.5, -1.0, -0.1], "token 1 is 6"),
        ([5, 7, 3], [-0.5, -1.0, -4.1], "token 3 is 3"),
        ([5, 7, 9] * 4, [-0.5, -1.0, -0.1] * 4, None),
        ([5, 7, 9], [float("nan"), -1.0, -0.1], "off by nan"),
        ([5, 7, 9], [-0.5, -1.0, float("nan")], "off by"),
        ([], [], "no answer"),
        ([5, 7], [-0.5], "no answer"),
    ],
)
def test_when_an_answer_is_the_models(tokens, logprobs, unlike):
    found = difference(STEPS, tokens, logprobs)
    assert found is None if unlike is None else unlike in found


def test_the_command(made, tmp_path, capsys):
    source, out = str(made()), str(tmp_path / "lm model")
    assert run(["convert", source, "--language-model", out])[0] == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["path"] == out
    line = f"vllm serve '{out}' --enable-prompt-embeds --enable-prefix-caching"
    assert line in told.err
    assert run(["convert", source, "--language-model", out, "--print-serve"])[0] == 0
    assert capsys.readouterr().out == line + "\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "either --output or --language-model"),
        (["-o", "a", "--language-model", "b"], "either --output or --language-model"),
        (["--language-model", "b", "--merge"], "goes with neither"),
        (["-o", "a", "--print-serve"], "--print-serve goes with --language-model"),
        (["-o", "a", "--base", "."], "--base needs --merge or --language-model"),
    ],
)
def test_words_that_do_not_fit(words, told):
    code, error = run(["convert", "model", *words])
    assert code == 2
    assert told in str(error)

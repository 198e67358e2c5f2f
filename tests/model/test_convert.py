import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from chatbind_cli.cli import run
from chatbind_cli.errors import ChatBindError, CheckpointError
from chatbind_cli.model.convert import convert
from chatbind_cli.model.loading import load_chatbind
from chatbind_cli.model.tokenizer import prepare_tokenizer
from tests.checkpoints.checkpoints import Maker

HIDDEN, WIDTH = 8, 8  # the width of the tests' tiny encoder
KINDS = ["llava_image_bind_select", "llava_image_bind_select_all", "llava"]


def tokenizer(*, pad):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *[f"▁w{i}" for i in range(17)]]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    prepare_tokenizer(fast, pad_token="[PAD]" if pad else None)
    return fast


@pytest.fixture
def make(tmp_path):
    return Maker(tmp_path / "made")


@pytest.fixture
def published(make):
    """`published(kind, layout, shards)`: a random model as it would have been published."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def write(kind="llava", layout="bin", shards=1, pad=True, **more):
        words = tokenizer(pad=pad)
        sizes = {
            "vocab_size": len(words),
            "hidden_size": HIDDEN,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 512,
        }
        torch.manual_seed(0)
        tensors = LlamaForCausalLM(LlamaConfig(**sizes)).half().state_dict()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
        tensors["model.mm_projector.weight"] = torch.randn(HIDDEN, WIDTH).half()
        tensors["model.mm_projector.bias"] = torch.randn(HIDDEN).half()
        tensors |= more
        config = {"model_type": kind, "mm_use_im_start_end": True, "mm_hidden_size": 1024} | sizes
        folder = make(f"{kind}-{layout}-{shards}", tensors, layout, shards, config)
        words.save_pretrained(folder)
        return folder

    return write


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layout", "shards"), [("bin", 1), ("legacy", 3), ("safetensors", 2)])
def test_what_comes_out_is_the_model_that_went_in(published, tmp_path, kind, layout, shards):
    source = published(kind, layout, shards, pad=kind != "llava")
    convert(source, tmp_path / "ours", shard_bytes=1000)
    before, after = load_chatbind(source), load_chatbind(tmp_path / "ours")
    theirs, ours = before.model.state_dict(), after.model.state_dict()
    assert set(theirs) == set(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert all(tensor.dtype == torch.float16 for tensor in ours.values())
    style = "llava_v1" if kind == "llava" else "multimodal"
    for config in (before.config, after.config):
        assert (config.stage, config.prompt_style) == ("published", style)
        assert config.normalize_embeddings is False
        assert config.embedding_dim == WIDTH
    assert before.config.medium_ids() == after.config.medium_ids()
    assert after.tokenizer.get_vocab() == before.tokenizer.get_vocab()


def test_a_folder_of_ours_is_cut_into_other_shards(published, tmp_path):
    convert(published(), tmp_path / "one")
    convert(tmp_path / "one", tmp_path / "many", shard_bytes=1000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = (load_chatbind(tmp_path / name) for name in ("one", "many"))
    ours, theirs = one.model.state_dict(), many.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert one.tokenizer.get_vocab() == many.tokenizer.get_vocab()


def test_the_command_ends_with_a_model_record_and_names_what_it_leaves_out(
    published, tmp_path, capsys
):
    source = published(**{"model.vision_tower.weight": torch.zeros(3)})
    assert run(["convert", str(source), "-o", str(tmp_path / "ours")])[0] == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert (record["artifact"], record["path"]) == ("model", str(tmp_path / "ours"))
    assert len(record["sha256"]) == 64
    assert "model.vision_tower.weight" in err
    with safe_open(tmp_path / "ours/model.safetensors", framework="pt") as file:
        assert not any("vision" in name or "inv_freq" in name for name in file.keys())  # noqa: SIM118


def test_what_is_no_published_model_is_refused_and_nothing_is_written(make, published, tmp_path):
    out = tmp_path / "ours"
    with pytest.raises(CheckpointError, match="is no ChatBind model"):
        convert(make("lm", make.llama(0)), out)
    short = published(layout="safetensors", **{"lm_head.weight": torch.zeros(2, HIDDEN).half()})
    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \[2, 8\]"):
        convert(short, out)
    centred = {"model.norm.weight": torch.randn(HIDDEN).half() * 0.001}
    for layer in range(2):
        for norm in ("input", "post_attention"):
            name = f"model.layers.{layer}.{norm}_layernorm.weight"
            centred[name] = torch.randn(HIDDEN).half() * 0.001
    with pytest.raises(CheckpointError, match="never applied"):
        convert(published("llava_image_bind_select", **centred), out)
    assert not out.exists()


@pytest.mark.parametrize("kind", ["llava_image_bind_select", "llava"])
@pytest.mark.parametrize("converted", [False, True])
def test_questions_are_answered_by_the_folder_as_it_is(
    published, tmp_path, capsys, kind, converted
):
    import numpy as np
    from PIL import Image

    from tests.inference.world import save_tiny_encoder

    model = published(kind, pad=kind != "llava")
    if converted:
        convert(model, tmp_path / "ours")
        model = tmp_path / "ours"
    save_tiny_encoder(tmp_path / "encoder", seed=0)
    Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(tmp_path / "a.png")
    words = ["-m", str(model), "--encoder", str(tmp_path / "encoder"), "--max-new-tokens", "3"]
    assert run(["ask", *words, "-a", str(tmp_path / "a.png"), "--json", "w1 w2"]) == (0, "")
    assert "text" in json.loads(capsys.readouterr().out.splitlines()[-1])
    question = {"question_id": 1, "text": "w3", "image": "a.png"}
    (tmp_path / "q.jsonl").write_text(json.dumps(question) + "\n")
    out = tmp_path / "answers.jsonl"
    more = ["-q", str(tmp_path / "q.jsonl"), "--media-root", str(tmp_path), "-o", str(out)]
    assert run(["vqa", *words, *more]) == (0, "")
    assert json.loads(out.read_text())["question_id"] == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from chatbind_cli.model import convert
from chatbind_cli.checkpoints import safetensors_file
left = int(sys.argv[3])
plain = safetensors_file.bytes_of
def bytes_of(piece):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(piece)
safetensors_file.bytes_of = bytes_of
convert.convert(Path(sys.argv[1]), Path(sys.argv[2]), shard_bytes=1000)
"""


def test_a_killed_conversion_goes_on_and_a_finished_one_is_left_alone(published, tmp_path, capsys):
    source = published("llava_image_bind_select")
    convert(source, tmp_path / "calm", shard_bytes=1000)
    for pieces in (3, 9):
        words = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "t"), str(pieces)]
        assert subprocess.run(words, check=False).returncode == -9
        assert not (tmp_path / "t").exists()
    finished = min((tmp_path / ".t.partial").glob("model-*"))
    before = finished.stat().st_mtime_ns
    done = convert(source, tmp_path / "t", shard_bytes=1000)
    assert "it is here already" not in done.notes
    assert (tmp_path / "t" / finished.name).stat().st_mtime_ns == before
    files = {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "calm").iterdir()}
    again = convert(source, tmp_path / "t", shard_bytes=1000)
    assert (again.sha256, again.notes[0]) == (done.sha256, "it is here already")
    with pytest.raises(ChatBindError, match="--overwrite"):
        convert(source, tmp_path / "t")  # other shards
    convert(source, tmp_path / "t", overwrite=True)
    assert run(["apply-delta", "--verify", str(tmp_path / "t")])[0] == 0
    assert json.loads(capsys.readouterr().out)["artifact"] == "model"


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "gpt2", "mixtral"])
def test_a_language_model_and_a_projector_become_one_folder(tmp_path, capsys, kind):
    from chatbind_cli.checkpoints.projector_file import write_projector
    from chatbind_cli.model.assemble import build_chatbind
    from chatbind_cli.model.config import EncoderInfo
    from chatbind_cli.model.loading import projector_of
    from tests.model.tiny import save_language_model

    base = save_language_model(tmp_path / "lm", kind)
    encoder = EncoderInfo(name="small", sha256="ab" * 32, embedding_dim=8, path="/enc")
    trained = build_chatbind(base, encoder=encoder, tokens_per_embedding=2, prompt_style="chat")
    file = tmp_path / "p.safetensors"
    write_projector(file, projector_of(trained.model))
    words = ["convert", str(base), "--projector", str(file), "-o", str(tmp_path / "joined")]
    assert run([*words, "--shard-size", "0.001"])[0] == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["artifact"], record["made_by"]) == ("model", "convert")
    joined = load_chatbind(tmp_path / "joined")
    wanted, found = trained.model.state_dict(), joined.model.state_dict()
    assert set(wanted) == set(found)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert (joined.config.prompt_style, joined.config.tokens_per_embedding) == ("chat", 2)
    assert joined.config.encoder["sha256"] == encoder.sha256
    assert run(["apply-delta", "--verify", str(tmp_path / "joined")])[0] == 0
    capsys.readouterr()
    assert run([*words, "--shard-size", "0.001"])[0] == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == record and "here already" in err
    other = projector_of(trained.model)
    other.tensors["projector.layers.0.bias"] += 1
    write_projector(file, other)
    code, message = run(words)
    assert code == 1 and "--overwrite" in message
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert run(["convert", "-", "--projector", "-", "-o", str(tmp_path / "x")])[0] == 2
    code, message = run(["convert", str(base), "-o", str(tmp_path / "x")])
    assert code == 1 and "--projector" in message


def test_an_edited_config_is_another_source(published, tmp_path):
    source = published("llava_image_bind_select")
    convert(source, tmp_path / "out")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    with pytest.raises(ChatBindError, match="--overwrite"):
        convert(source, tmp_path / "out")


def test_the_folder_one_is_in_is_refused_at_once(published, tmp_path, monkeypatch):
    source = published("llava_image_bind_select")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    before = sorted(tmp_path.rglob("*"))
    code, message = run(["convert", str(source), "-o", "."])
    assert code == 1 and "folder that this runs in" in message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_config_that_makes_no_model_is_one_error(published, tmp_path):
    folder = tmp_path / "ours"
    convert(published(), folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {"rope_type": "none such", "rope_theta": 1.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="makes no model"):
        convert(folder, tmp_path / "out")

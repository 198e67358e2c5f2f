"""`finetune --lora-r`: what trains, what is left behind, who opens it, and what nobody opens."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from chatbind_cli.checkpoints.projector_file import read_projector
from chatbind_cli.errors import ChatBindError, CheckpointError, UsageError
from chatbind_cli.model.adapters import (
    adapted_layers,
    adapter_parameters,
    add_adapters,
    lora_config,
)
from chatbind_cli.model.loading import load_chatbind
from chatbind_cli.training import run as training_run
from chatbind_cli.training.settings import TrainingSettings
from chatbind_cli.training.throughput import ModelFlops
from tests.training.conftest import DIM
from tests.training.test_resume import unfinish

KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": (MistralConfig, {"num_key_value_heads": 2}),
    "gpt_neox": (GPTNeoXConfig, {}),
}
# a rate at which a few steps change answers
LORA = ("--max-steps", "4", "--learning-rate", "0.05", "--lora-r", "4", "--lora-alpha", "8")


def language_model(kind: str, world, folder: Path) -> Path:
    config_class, more = KINDS[kind]
    tokenizer = AutoTokenizer.from_pretrained(world.llama)
    torch.manual_seed(4)
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def args(world, base: Path, output: Path, *more: str) -> list[str]:
    words = ["finetune", *world.args(output, *LORA, *more)]
    words[words.index("-m") + 1] = str(base)
    return words


def logits(model: Any) -> torch.Tensor:
    """What a model says after a picture and some words; [1, length, known tokens].

    Of media tokens, which no answer has: with tied weights their output rows follow the trained
    input rows only once they are saved.
    """
    config = model.config
    ids = torch.tensor([[1, 7, *config.medium_ids(), 30, 31, 32, 33]])
    vector = torch.linspace(-1, 1, DIM).unsqueeze(0)
    with torch.no_grad():
        said = model.eval()(input_ids=ids, media_embeddings=vector).logits
    return said[..., : min(config.im_patch_id, config.im_start_id)]


@pytest.fixture
def trained(monkeypatch) -> list[Any]:
    """What the runs of a test have in memory when they write their results."""
    kept: list[Any] = []
    write = training_run.write_adapted

    def keep(bundle, folder, settings) -> None:
        kept.append(bundle)
        write(bundle, folder, settings)

    monkeypatch.setattr(training_run, "write_adapted", keep)
    return kept


@pytest.fixture(scope="module")
def base(world, tmp_path_factory) -> Path:
    return language_model("llama", world, tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def adapted(world, base, tmp_path_factory) -> Path:
    """A folder of adapters that was trained for a few steps."""
    from chatbind_cli.cli import run

    out = tmp_path_factory.mktemp("adapted") / "out"
    assert run(args(world, base, out)) == (0, "")
    return out


@pytest.mark.parametrize(
    ("kind", "dora"), [*((kind, ()) for kind in KINDS), ("llama", ("--lora-dora",))]
)
def test_what_is_opened_says_what_the_trained_model_says(
    world, here, trained, tmp_path, kind, dora
) -> None:
    base = language_model(kind, world, tmp_path / "base")
    done = here(*args(world, base, tmp_path / "out", *dora))
    assert done.code == 0, done.stderr
    wanted = logits(trained[0].model)
    opened = load_chatbind(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(opened.model), wanted, atol=2e-5)
    # and not because nothing had happened
    names = [name for name, p in trained[0].model.named_parameters() if p.requires_grad]
    assert any("lora_magnitude" in name for name in names) == bool(dora)
    untouched = load_chatbind(tmp_path / "out", dtype=torch.float32, merge=False)
    with torch.no_grad():
        for name, parameter in adapter_parameters(untouched.model.language_model):
            if "lora_B" in name:
                parameter.zero_()
    assert not torch.allclose(logits(untouched.model), wanted, atol=1e-2)
    merged = here("convert", str(tmp_path / "out"), "--merge", "-o", str(tmp_path / "merged"))
    assert merged.code == 0, merged.stderr
    shutil.rmtree(base)
    whole = load_chatbind(tmp_path / "merged")
    for name, tensor in opened.model.state_dict().items():
        assert torch.equal(whole.model.state_dict()[name], tensor), name
    assert torch.allclose(logits(whole.model), wanted, atol=2e-5)
    assert whole.config.base_model is None


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's, of transformers
def test_the_folder_is_small_and_other_programs_read_it(world, adapted, base) -> None:
    names = {path.name for path in adapted.iterdir() if path.suffix in (".safetensors", ".bin")}
    assert names == {"adapter_model.safetensors", "projector.safetensors"}
    checkpoint = load_file(adapted / "checkpoint-4" / "trained.safetensors")
    kinds = {part for n in checkpoint for part in ("lora_", "projector", ".rows") if part in n}
    assert kinds == {"lora_", "projector", ".rows"}
    assert all(any(part in name for part in kinds) for name in checkpoint)
    ids = torch.tensor([[1, 7, 30, 31]])
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapted)
    ours = load_chatbind(adapted).model
    with torch.no_grad():
        wanted = theirs.eval()(ids).logits
        assert torch.allclose(ours(ids).logits[..., : wanted.shape[-1]], wanted, atol=2e-5)


def test_commands_take_the_folder_as_a_model(world, here, adapted, base, tmp_path) -> None:
    picture, words = str(world.media / "p1.png"), ["--encoder", str(world.imagebind)]
    question = ["What is this?", "-a", picture, "--device", "cpu", "--max-new-tokens", "4"]
    more = [*words, "--allow-encoder-mismatch", "--json"]
    answered = here("ask", "-m", str(adapted), *question, *more)
    assert answered.code == 0, answered.stderr
    assert here("convert", str(adapted), "--merge", "-o", str(tmp_path / "whole")).code == 0
    again = here("ask", "-m", str(tmp_path / "whole"), *question, *more)
    assert again.records[0]["text"] == answered.records[0]["text"]
    moved = here("ask", "-m", str(adapted), "--base", str(world.llama), *question, *more)
    assert f"adapters of another model than the one at {world.llama}" in moved.stderr
    beside = here("ask", "-m", str(base), "--adapter", str(adapted), *question, *more)
    assert beside.records[0]["text"] == answered.records[0]["text"], beside.stderr
    twice = ("--adapter", str(adapted), "--base", str(base))
    assert "has its own projector" in here("ask", "-m", str(base), *twice, *question).stderr
    there = here("ask", "-m", str(adapted), "--base", str(base), *question, *more)
    assert there.records[0]["text"] == answered.records[0]["text"]
    taken = here("extract-projector", str(adapted), "-o", str(tmp_path / "p.safetensors"))
    assert taken.code == 0, taken.stderr
    own = read_projector(adapted / "projector.safetensors")
    other = read_projector(tmp_path / "p.safetensors")
    assert torch.equal(own.token_embeddings["im_start"], other.token_embeddings["im_start"])
    shown = here("inspect", str(world.captions), "-m", str(adapted), "--json")
    assert shown.code == 0, shown.stderr
    refused = here("convert", str(adapted), "-o", str(tmp_path / "plain"))
    assert "holds adapters, and not the model that they belong to; say --merge" in refused.stderr
    whole = here("convert", str(tmp_path / "whole"), "--merge", "-o", str(tmp_path / "x"))
    assert "holds no adapters to merge" in whole.stderr


def test_a_base_that_moved_or_changed(world, here, base, tmp_path) -> None:
    first = tmp_path / "first"
    shutil.copytree(base, first)
    assert here(*args(world, first, tmp_path / "out", "--max-steps", "1")).code == 0
    first.rename(tmp_path / "second")
    with pytest.raises(CheckpointError, match=r"base model is not at .*first.*--base"):
        load_chatbind(tmp_path / "out")
    load_chatbind(tmp_path / "out", base=tmp_path / "second")
    with pytest.raises(CheckpointError, match=r"adapters of another model than the one at"):
        load_chatbind(tmp_path / "out", base=world.llama)
    with pytest.raises(CheckpointError, match="takes no --base"):
        load_chatbind(_merged(tmp_path), base=tmp_path / "second")


def _merged(folder: Path) -> Path:
    from chatbind_cli.model.whole import merge

    merge(folder / "out", folder / "merged", base=folder / "second")
    return folder / "merged"


def test_a_run_goes_on_bit_for_bit(world, here, base, tmp_path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert here(*args(world, base, whole, "--save-steps", "2")).code == 0
    shutil.copytree(whole, resumed)
    unfinish(resumed, "checkpoint-2")
    done = here(*args(world, base, resumed, "--save-steps", "2"))
    assert done.code == 0, done.stderr
    assert "going on from step 2 of 4" in done.stderr
    for name in ("adapter_model.safetensors", "projector.safetensors"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_training_goes_on_with_the_adapters_of_a_folder(
    world, here, adapted, base, trained, tmp_path
) -> None:
    done = here(*args(world, adapted, tmp_path / "on"))
    assert done.code == 0, done.stderr
    config = json.loads((tmp_path / "on" / "config.json").read_text())
    assert config["base_model"]["path"] == str(base)
    opened = load_chatbind(tmp_path / "on", dtype=torch.float32)
    assert torch.allclose(logits(opened.model), logits(trained[0].model), atol=2e-5)
    refused = here(*args(world, adapted, tmp_path / "other", "--lora-r", "8"))
    assert "whose r is 4, not 8" in refused.stderr
    # without adapters of its own, training changes the sum
    words = ["finetune", *world.args(tmp_path / "full", "--max-steps", "1")]
    words[words.index("-m") + 1] = str(adapted)
    words += ["--learning-rate", "0"]
    assert here(*words).code == 0
    full = load_chatbind(tmp_path / "full")
    assert full.config.base_model is None
    assert torch.equal(logits(full.model), logits(load_chatbind(adapted).model))


def hostile(adapted: Path, folder: Path, **said: Any) -> Path:
    shutil.copytree(adapted, folder)
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text()) | said
    path.write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "says auto_map ="),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}}, "auto_mapping"),
        ({"peft_type": "CORDA"}, "is of the method 'CORDA'"),
        ({"target_modules": "(a+)+$"}, "says target_modules ="),
        ({"target_modules": ["self_attn"]}, "goes beside model.layers.0.self_attn, which is no"),
        ({"target_modules": ["lm_head"]}, "goes beside lm_head, which is no"),
        ({"target_modules": ["q_proj"]}, "is not there by adapter_config.json"),
        ({"r": 1_000_000_000}, r"is .4, 48. in the file, and is .1000000000, 48. by"),
        ({"r": "4"}, "says r = '4'"),
        ({"lora_alpha": None}, "says lora_alpha = None"),
        ({"use_dora": True}, "is not there in the file, and is"),
        ({"modules_to_save": ["lm_head"]}, "says modules_to_save ="),
        ({"layer_replication": [[0, 2], [0, 2]]}, "says layer_replication ="),
        ({"init_lora_weights": "pissa", "base_model_name_or_path": "evil/base"}, None),
    ],
)
def test_an_adapter_says_a_few_numbers_and_no_more(adapted, tmp_path, said, told) -> None:
    folder = hostile(adapted, tmp_path / "folder", **said)
    if told is None:
        opened = load_chatbind(folder)
        assert torch.equal(logits(opened.model), logits(load_chatbind(adapted).model))
    else:
        with pytest.raises(CheckpointError, match=told):
            load_chatbind(folder)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


def test_a_pickle_is_not_read(adapted, tmp_path) -> None:
    folder = hostile(adapted, tmp_path / "folder")
    weights = folder / "adapter_model.safetensors"
    weights.unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="has no adapter_model.safetensors"):
        load_chatbind(folder)
    shutil.copy(folder / "adapter_model.bin", weights)
    with pytest.raises(ChatBindError, match="adapter_model.safetensors"):
        load_chatbind(folder)


def test_numbers_that_are_none_are_refused(adapted, tmp_path) -> None:
    folder = hostile(adapted, tmp_path / "folder")
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values()))[0] = torch.nan
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="not finite"):
        load_chatbind(folder)


@pytest.mark.parametrize(
    ("base_model", "told"),
    [
        ({"path": "/", "fingerprint": "0" * 64}, "adapters of another model"),
        ({"path": "evil/base", "fingerprint": "0" * 64}, "base model is not at"),
        ({"path": "https://evil.example/base", "fingerprint": "0" * 64}, "is not at"),
        ({"path": "/"}, "not a path and a fingerprint"),
        ({"path": ["/"], "fingerprint": "0"}, "not a path and a fingerprint"),
        ("/", "not a path and a fingerprint"),
    ],
)
def test_a_base_is_a_folder_with_the_fingerprint(adapted, tmp_path, base_model, told) -> None:
    folder = hostile(adapted, tmp_path / "folder")
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model": base_model}))
    with pytest.raises(CheckpointError, match=told):
        load_chatbind(folder)


def test_adapters_of_a_half_model_are_float32_and_are_counted(base) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).requires_grad_(False)
    before = ModelFlops.of(model)
    count = add_adapters(model, lora_config(model, r=4, alpha=8, targets=["q_proj", "up_proj"]))
    assert count == 4
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
    after = ModelFlops.of(model)
    assert after.passes == before.passes == 2
    assert after.body - before.body == 2 * 4 * (32 + 32 + 32 + 48)


def test_mixed_precision_and_the_rate_of_adapters(world, here, base, trained, tmp_path) -> None:
    words = [word for word in args(world, base, tmp_path / "out", "--bf16") if word != "0.05"]
    words.remove("--learning-rate")
    done = here(*words)
    assert done.code == 0, done.stderr
    assert max(record["learning_rate"] for record in done.records[:-1]) == 2e-4
    model = trained[0].model.language_model
    layers = [layer for _, layer in adapted_layers(model)]
    # float32 copies of what goes into the matrices would be kept for the backward pass
    assert {layer.cast_input_dtype_enabled for layer in layers} == {False}
    assert {layer.get_base_layer().weight.dtype for layer in layers} == {torch.bfloat16}


def test_matrices_are_named_by_their_last_part(base) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(UsageError, match=r"has no matrix 'lm_head'.*down_proj, gate_proj, k_proj"):
        lora_config(model, r=4, alpha=8, targets=["q_proj", "lm_head"])


def test_words_that_make_no_sense(world, here, tmp_path) -> None:
    for words, told in {
        ("--lora-alpha", "8"): "--lora-alpha needs --lora-r",
        ("--load-in-4bit",): "--load-in-4bit needs --lora-r",
        ("--lora-r", "4", "--load-in-4bit"): "--load-in-4bit needs an NVIDIA GPU",
        ("--lora-r", "4", "--freeze-backbone"): "--freeze-backbone trains no adapters",
        ("--lora-r", "4", "--save-dtype", "bfloat16"): "adapters are saved in float32",
        ("--lora-r", "4", "--lora-targets", "q"): "has no matrix 'q'",
    }.items():
        refused = here("finetune", *world.args(tmp_path / "out", *words))
        assert refused.code == 2, words
        assert told in refused.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def test_runs_without_adapters_are_those_of_before() -> None:
    def made(**values: Any) -> TrainingSettings:
        common = {"model": Path("m"), "data": (), "output": Path("o")}
        return TrainingSettings(stage="finetune", **common, **values)

    plain, adapted = made(), made(lora_r=4)
    assert plain.backbone_trains and adapted.backbone_trains
    assert plain.matrices_train and not adapted.matrices_train
    assert {v for k, v in plain.identity(1).items() if "lora" in k or "4bit" in k} <= {None}
    assert adapted.identity(1)["lora_r"] == 4


def test_an_engine_gets_the_sum_and_is_asked_in_its_words(adapted, base, tmp_path) -> None:
    import transformers

    from chatbind_cli.inference.front import load_front
    from chatbind_cli.model.probe import probe_embeddings, read_probe
    from chatbind_cli.model.whole import language_model as by_itself

    by_itself(adapted, tmp_path / "lm")
    whole = load_chatbind(adapted)
    served = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    front = load_front(adapted, dtype="float32").bundle
    with torch.inference_mode():
        words = probe_embeddings(front.model, front.tokenizer)
        expected = probe_embeddings(whole.model, whole.tokenizer)
        assert torch.allclose(words, expected, atol=1e-6)
        there = served(inputs_embeds=words.unsqueeze(0)).logits
        assert torch.allclose(there, whole.model(inputs_embeds=expected.unsqueeze(0)).logits)
    assert len(read_probe(adapted)) == 16
    assert front.model.generation_config.eos_token_id == whole.model.generation_config.eos_token_id

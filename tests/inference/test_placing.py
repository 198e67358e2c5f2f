"""In which numbers a model answers, where it lies, and what is put beside its matrices."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from chatbind_cli.commands._inference import ModelChoice
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from chatbind_cli import cli, hardware
from chatbind_cli.errors import CheckpointError, UsageError
from chatbind_cli.inference import placing
from chatbind_cli.inference.loaded_model import load_model
from chatbind_cli.inference.placing import plan_layers, resolve_numbers
from chatbind_cli.launch import Dispatch
from chatbind_cli.model.adapters import (
    adapted_layers,
    adapter_parameters,
    add_adapters,
    lora_config,
    write_adapters,
)
from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration
from chatbind_cli.model.config import ChatBindConfig
from chatbind_cli.model.pretrained import open_model
from chatbind_cli.model.quantization import keep_whole
from tests.inference.world import World, questions
from tests.model.tiny import language_model

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the CPU multiplies, and how many bytes there are and are free."""

    def set_to(*, units: bool, everything: int = 1 << 40, free: int = 1 << 40) -> None:
        monkeypatch.setattr(placing, "multiplies_bfloat16", lambda: units)
        monkeypatch.setattr(placing, "memory", lambda: (everything, free))

    return set_to


def saved(folder: Path, dtype: torch.dtype, size: int = 32, layers: int = 2) -> Path:
    sizes = {"hidden_size": size, "intermediate_size": 2 * size, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=100, num_attention_heads=2, **sizes)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return folder


def test_bfloat16_stays_on_a_cpu_that_multiplies_it(tmp_path: Path, machine: Any) -> None:
    folder = saved(tmp_path, torch.bfloat16)
    machine(units=True)
    assert resolve_numbers("auto", CPU, folder) is torch.bfloat16
    assert resolve_numbers("float32", CPU, folder) is torch.float32
    machine(units=False)
    assert resolve_numbers("auto", CPU, folder) is torch.float32
    assert resolve_numbers("auto", torch.device("cuda"), folder) is torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_bytes_are_kept_where_four_do_not_fit(
    dtype: torch.dtype,
    tmp_path: Path,
    machine: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = saved(tmp_path, dtype)
    needed = 2 * (folder / "model.safetensors").stat().st_size
    machine(units=False, everything=4 * needed, free=2 * needed)
    capsys.readouterr()
    assert resolve_numbers("auto", CPU, folder) is torch.float32
    assert capsys.readouterr().err == ""
    machine(units=False, everything=4 * needed, free=needed)
    assert resolve_numbers("auto", CPU, folder) is torch.bfloat16
    assert "answers in bfloat16: in float32 the weights would take" in capsys.readouterr().err
    # workers go by what the machine has, not by what is left when they look
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert resolve_numbers("auto", CPU, folder) is torch.float32
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert resolve_numbers("auto", CPU, folder) is torch.bfloat16


def test_float32_weights_are_never_rounded_unasked(tmp_path: Path, machine: Any) -> None:
    machine(units=True, everything=1, free=1)
    assert resolve_numbers("auto", CPU, saved(tmp_path, torch.float32)) is torch.float32


def test_what_a_folder_lacks_is_said_where_it_is_loaded(tmp_path: Path) -> None:
    assert resolve_numbers("auto", CPU, tmp_path) is torch.float32


def test_the_encoder_keeps_its_own_numbers(world: World, machine: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world.model, tmp_path / "model"))
    halved = {n: t.bfloat16() for n, t in load_file(folder / "model.safetensors").items()}
    save_file(halved, folder / "model.safetensors", metadata={"format": "pt"})
    machine(units=True)
    model = load_model(folder, device="cpu")
    assert (model.dtype, model.identity()["dtype"]) == (torch.bfloat16, "bfloat16")
    assert model.find_encoder().dtype is torch.float32
    said = load_model(folder, device="cpu", dtype="bfloat16")
    assert said.find_encoder().dtype is torch.bfloat16


def test_where_bfloat16_is_kept_it_is_not_slower() -> None:
    if not hardware.multiplies_bfloat16():
        pytest.skip("this CPU has no units for bfloat16")
    seconds = dict.fromkeys((torch.float32, torch.bfloat16), 9.0)
    for dtype in 3 * [*seconds]:
        matrix, rows = torch.ones(1024, 1024, dtype=dtype), torch.ones(64, 1024, dtype=dtype)
        torch.nn.functional.linear(rows, matrix)
        began = os.times().user
        for _ in range(30):
            torch.nn.functional.linear(rows, matrix)
        seconds[dtype] = min(seconds[dtype], os.times().user - began)
    assert seconds[torch.bfloat16] <= seconds[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_never_held_twice(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(tmp_path, torch.bfloat16, size=512, layers=12)

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    model = open_model(folder, dtype=dtype)
    taken = status("VmHWM") - before
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert taken < 1.35 * size


def wrapped(kind: str) -> ChatBindForConditionalGeneration:
    inner = language_model(kind)
    return ChatBindForConditionalGeneration(
        ChatBindConfig(text_config=inner.config, embedding_dim=8, im_patch_id=5), inner
    )


def test_layers_are_whole_and_tied_weights_together(monkeypatch: pytest.MonkeyPatch) -> None:
    # accelerate leaves out devices that are not here
    monkeypatch.setattr("accelerate.utils.modeling.get_max_memory", dict)
    for kind in ("llama", "qwen2_tied", "gpt_neox"):
        model = wrapped(kind)
        size = 4 * sum(p.numel() for p in model.parameters())
        plan = plan_layers(model, {0: 0.9 * size, 1: 0.9 * size, "cpu": 0})
        assert {*plan.values()} == {0, 1}

        def place(name: str, plan: dict[str, Any] = plan) -> Any:
            return next(v for k, v in plan.items() if name == k or name.startswith(f"{k}."))

        for name, module in model.named_modules():
            if type(module).__name__ in (model._no_split_modules or ()):
                assert len({place(f"{name}.{p}") for p, _ in module.named_parameters()}) == 1
    tied = plan_layers(wrapped("qwen2_tied"), {0: 70_000, 1: 80_000, "cpu": 0})
    assert tied["language_model.model.embed_tokens"] == tied["language_model.lm_head"]
    with pytest.raises(CheckpointError, match="larger than GPUs and memory together"):
        plan_layers(wrapped("llama"), {0: 1000, "cpu": 1000})


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[1, 5, 6, model.config.im_patch_id, 7]])
    with torch.inference_mode():
        result: torch.Tensor = model(ids, media_embeddings=torch.ones(1, 8)).logits
    return result


def test_a_model_that_is_spread_without_a_gpu_lies_in_memory(world: World) -> None:
    plain = logits(load_model(world.model, device="cpu").bundle.model)
    for word in ("auto", "balanced", "cpu"):
        model = load_model(world.model, device_map=word).bundle.model
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        assert torch.equal(logits(model), plain)


def test_nothing_looks_at_weights_that_are_brought_when_they_are_needed(
    world: World, tmp_path: Path
) -> None:
    model = load_model(world.model, device="cpu").bundle.model
    plain = logits(model)
    # on a machine without a GPU, weights can be elsewhere only on a disk
    layers = {"language_model.model.embed_tokens": "disk", "projector": "disk"}
    rest = ("model.layers", "model.norm", "model.rotary_emb", "lm_head")
    layers |= {f"language_model.{name}": "cpu" for name in rest}
    dispatch_model(model, layers, main_device="cpu", offload_dir=tmp_path)
    assert model.projector.layers[0].weight.is_meta
    torch.testing.assert_close(logits(model), plain, rtol=1e-5, atol=1e-5)


def test_two_words_for_one_place_are_refused(world: World) -> None:
    with pytest.raises(UsageError, match="both say where the model is"):
        load_model(world.model, device="cuda:1", device_map="auto")


def test_one_model_on_all_gpus_is_one_process_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "gpu_count", lambda: 4)

    def planned(device_map: str | None, **plan: Any) -> Dispatch:
        rest = dict.fromkeys(ModelChoice.__dataclass_fields__)
        return ModelChoice(**{**rest, "device_map": device_map}).dispatch(Dispatch(**plan))

    assert planned(None).wanted_processes == 4
    assert planned("auto").wanted_processes == 1
    assert planned("balanced", num_machines=3).wanted_processes == 3
    assert not planned("cpu").uses_gpu
    with pytest.raises(UsageError, match="--num-processes 4 asks for several"):
        planned("auto", num_processes=4, num_machines=2)


@pytest.mark.parametrize("word", ["8bit", "4bit"])
def test_packing_needs_a_gpu(word: str, world: World) -> None:
    words = ["vqa", "-m", str(world.model), "--device", "cpu", "--load-in", word]
    result = CliRunner().invoke(cli.app, words, input="{}")
    assert isinstance(result.exception, UsageError)
    assert f"--load-in {word} needs an NVIDIA GPU" in str(result.exception)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2"])
def test_projector_and_output_layer_are_not_packed(kind: str) -> None:
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.quantizers_utils import should_convert_module

    model, config = wrapped(kind), BitsAndBytesConfig(load_in_8bit=True)
    keep_whole(config, model)
    skipped = config.llm_int8_skip_modules
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    kept = [name for name in linear if not should_convert_module(name, skipped)]
    assert kept == [n for n in linear if n.startswith("projector") or n.endswith("lm_head")]


def adapters(folder: Path, model: Any, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    inner = model.bundle.model.language_model
    add_adapters(inner, lora_config(inner, r=4, alpha=8))
    with torch.no_grad():
        for _, parameter in adapter_parameters(inner):
            parameter.normal_(std=0.3)
    folder.mkdir()
    write_adapters(inner, folder, folder)
    return folder


def test_adapters_change_answers_and_identity(world: World, tmp_path: Path) -> None:
    plain = load_model(world.model, device="cpu")
    beside = load_model(world.model, device="cpu")
    folder = adapters(tmp_path / "lora", beside)
    merged = load_model(world.model, adapter=folder, device="cpu")
    torch.testing.assert_close(
        logits(merged.bundle.model), logits(beside.bundle.model), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(logits(merged.bundle.model), logits(plain.bundle.model), atol=0.1)
    assert merged.model_id == "model+lora"
    assert not list(adapted_layers(merged.bundle.model.language_model))
    parts = load_model(world.llama, projector=world.projector, adapter=folder, device="cpu")
    assert parts.model_id == "llama+projector+lora"
    torch.testing.assert_close(
        logits(parts.bundle.model), logits(merged.bundle.model), rtol=1e-4, atol=1e-4
    )
    other = adapters(tmp_path / "other", load_model(world.model, device="cpu"), seed=1)
    again = load_model(world.model, adapter=other, device="cpu")
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    same = load_model(world.model, adapter=copy, device="cpu")
    assert len({loaded.sha256 for loaded in (plain, merged, again, parts)}) == 4
    assert same.sha256 == merged.sha256


def test_a_folder_without_adapters_is_named(world: World, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no adapter_config.json"):
        load_model(world.model, adapter=tmp_path, device="cpu")


def test_attention_reaches_the_model_and_the_answers(world: World) -> None:
    words = ["vqa", "-m", str(world.model), "--media-root", str(world.media), "--device", "cpu"]
    words += ["--attn-implementation", "eager", "--max-new-tokens", "2"]
    result = CliRunner().invoke(cli.app, words, input=json.dumps(questions(1)[0]))
    metadata = json.loads(result.stdout)["metadata"]
    assert (metadata["attn_implementation"], metadata["dtype"]) == ("eager", "float32")
    for name in ("eager", "sdpa"):
        loaded = load_model(world.model, device="cpu", attn_implementation=name)
        assert loaded.bundle.model.language_model.config._attn_implementation == name

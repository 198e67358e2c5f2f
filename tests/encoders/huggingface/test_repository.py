"""What all Hugging Face kinds share: parts of models, misfits, hostile settings."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time

import pytest
import torch
from transformers import CLIPModel

from chatbind_cli.encoders.huggingface.repository import licence_of, load_part, open_processor
from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.errors import ChatBindError, CheckpointError, WeightsError
from chatbind_cli.model.pretrained import open_config

from .tiny import clip, edit_json, edit_tensors

CPU = torch.device("cpu")
TEXTS = ("text_model", "text_projection")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "copy")


def part(folder, without=TEXTS, dtype=torch.float32):
    return load_part(
        CLIPModel, open_config(folder), folder, device=CPU, dtype=dtype, without=without
    )


def test_a_part_gives_what_the_whole_gives_and_holds_nothing_of_the_rest(made):
    model = part(made[0])
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = made[1].get_image_features(pixels).pooler_output
        # as exactly as numbers that lie elsewhere in memory
        assert torch.allclose(model.get_image_features(pixels).pooler_output, whole, atol=1e-5)
    assert not [name for name, _ in model.named_parameters() if name.startswith("text")]
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert part(made[0], dtype=torch.bfloat16).dtype == torch.bfloat16


def test_what_is_not_needed_is_not_read(folder):
    edit_tensors(folder, lambda found: found["text_projection.weight"].fill_(torch.nan))
    part(folder)
    with pytest.raises(WeightsError, match="text_projection.weight holds NaN"):
        part(folder, without=("vision_model", "visual_projection"))


def test_a_file_that_is_not_what_is_read_of_its_folder_is_refused(folder):
    opened = open_encoder(folder / "model.safetensors")
    assert opened.sha256 == open_encoder(folder).sha256
    shutil.copy(folder / "model.safetensors", folder / "tuned.safetensors")
    with pytest.raises(WeightsError, match=r"its folder, which is model.safetensors; name the"):
        open_encoder(folder / "tuned.safetensors")


def test_a_broken_config_is_what_the_error_is_about(folder):
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config.json: "):
        open_encoder(folder)


CLASS = "vision_model.embeddings.class_embedding"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found.pop(CLASS), f"1 tensors are missing, the first is {CLASS}"),
        (lambda found: found.update({CLASS: torch.ones(7)}), rf"{CLASS} is \[7\] in the file and"),
        (lambda found: found[CLASS].fill_(torch.inf), f"{CLASS} holds NaN or infinity"),
        (lambda found: found.update({CLASS: found[CLASS].byte()}), f"{CLASS} holds torch.uint8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, said):
    edit_tensors(folder, change)
    with pytest.raises(WeightsError, match=said):
        part(folder)


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 10**9},
        {"image_size": 10**6},
        {"num_hidden_layers": 10**9},
        {"num_labels": 10**9},
        {"num_attention_heads": 0},
    ],
)
def test_a_config_that_asks_for_too_much_is_refused_before_it_is_made(folder, sizes):
    path = folder / "config.json"
    edit_json(path, vision_config={**json.loads(path.read_text())["vision_config"], **sizes})
    start = time.monotonic()
    with pytest.raises(CheckpointError):
        part(folder)
    assert time.monotonic() - start < 2


def test_a_config_that_cannot_be_is_one_line(folder):
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    edit_json(folder / "config.json", vision_config={**vision, "patch_size": 0})
    with pytest.raises(CheckpointError, match="cannot be opened .*by zero"):  # and no warning
        part(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 10**6}},
        {"crop_size": 10**6},
        {"crop_pct": 1e-9},
        {"max_num_patches": 16_000, "patch_size": 2000},
    ],
)
def test_a_processor_that_makes_much_of_little_is_refused(folder, settings):
    edit_json(folder / "preprocessor_config.json", **settings)
    with pytest.raises(WeightsError, match="asks for"):
        open_processor(folder)


def test_code_of_a_repository_never_runs(folder):
    (folder / "own.py").write_text("raise SystemExit('ran')")
    edit_json(folder / "config.json", auto_map={"AutoConfig": "own.A", "AutoModel": "own.B"})
    mapped = {"AutoImageProcessor": "own.C"}
    edit_json(folder / "preprocessor_config.json", auto_map=mapped)
    part(folder)  # by transformers' own class
    open_processor(folder)
    edit_json(folder / "preprocessor_config.json", image_processor_type="Own")
    edit_json(folder / "config.json", model_type="own")
    open_processor.cache_clear()
    for attempt in (part, open_processor):
        with pytest.raises(ChatBindError):
            attempt(folder)


class _Runs:
    def __reduce__(self):
        return (print, ("ran",))


def test_a_pickle_with_code_is_refused(folder, capsys):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": _Runs()}))
    with pytest.raises(WeightsError):
        part(folder)
    assert "ran" not in capsys.readouterr().out


def test_a_folder_without_a_processor_says_so(folder):
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="no usable processor"):
        open_processor(folder)


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\nlicense: mit\n", "apache-2.0"),
        ("---\r\nlicense: 'mit'\r\n---\r\n", "mit"),
        ("---\ntags: [a]\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("A page of\nlicense: mit\n", None),
    ],
)
def test_the_licence_is_what_the_head_of_the_readme_names(tmp_path, text, licence):
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_bytes(text.encode())
    assert licence_of(tmp_path) == licence


@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_the_readme_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "README.md")
    assert licence_of(tmp_path) is None

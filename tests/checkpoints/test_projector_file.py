"""The projector on its own: our file, the published layout, and every spelling of its tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from chatbind_cli.checkpoints.projector_file import (
    projector_from_tensors,
    projector_key,
    read_projector,
    write_projector,
)
from chatbind_cli.errors import CheckpointError, WeightsError
from chatbind_cli.model.chatbind import (
    ChatBindConfig,
    ChatBindForConditionalGeneration,
    word_embeddings,
)
from chatbind_cli.model.loading import load_into, projector_of
from tests.model.tiny import language_model


def chatbind(**fields: object) -> ChatBindForConditionalGeneration:
    base = language_model()
    config = ChatBindConfig(
        text_config=base.config,
        im_patch_id=97,
        im_start_id=98,
        im_end_id=99,
        **{
            "embedding_dim": 8,
            "encoder": {"name": "small", "sha256": "ab" * 32},
            "prompt_style": "vicuna_v1_1",
            "media_options": {"clip_sampler": "imagebind"},
            **fields,
        },
    )
    return ChatBindForConditionalGeneration(config, base)


@pytest.mark.parametrize(
    "fields",
    [{}, {"tokens_per_embedding": 3}, {"projector_type": "mlp2x_gelu", "tokens_per_embedding": 2}],
)
def test_our_file_holds_weights_token_embeddings_and_identity(
    fields: dict[str, object], tmp_path: Path
) -> None:
    model = chatbind(**fields)
    write_projector(tmp_path / "p.safetensors", projector_of(model))
    file = read_projector(tmp_path / "p.safetensors")
    info = file.info
    assert info.encoder == {"name": "small", "sha256": "ab" * 32}
    assert info.prompt_style == "vicuna_v1_1"
    assert info.media_options == {"clip_sampler": "imagebind"}
    assert (info.embedding_dim, info.hidden_size) == (8, 32)
    assert info.tokens_per_embedding == fields.get("tokens_per_embedding", 1)
    assert torch.equal(file.token_embeddings["im_start"], word_embeddings(model).weight[98])
    fresh = chatbind(**fields)
    torch.nn.init.zeros_(word_embeddings(fresh).weight)
    load_into(fresh, file, "p")
    media = torch.randn(2, 8)
    assert torch.equal(fresh.soft_tokens(media), model.soft_tokens(media))
    assert torch.equal(word_embeddings(fresh).weight[97:], word_embeddings(model).weight[97:])
    assert word_embeddings(fresh).weight[:97].abs().max() == 0


def test_the_keys_and_metadata_are_those_of_the_contract(tmp_path: Path) -> None:
    write_projector(tmp_path / "p.safetensors", projector_of(chatbind()))
    with safe_open(tmp_path / "p.safetensors", framework="pt") as file:
        names = set(file.keys())
        told = json.loads(file.metadata()["chatbind"])
    assert names == {
        "projector.layers.0.weight",
        "projector.layers.0.bias",
        "token_embeddings.im_patch",
        "token_embeddings.im_start",
        "token_embeddings.im_end",
    }
    assert told["tokens_per_embedding"] == 1


def test_the_published_layout_comes_back_without_identity(tmp_path: Path) -> None:
    model = chatbind()
    write_projector(tmp_path / "p.bin", projector_of(model))
    layout = torch.load(tmp_path / "p.bin", weights_only=True)
    assert set(layout) == {
        "model.mm_projector.weight",
        "model.mm_projector.bias",
        "model.embed_tokens.weight",
    }
    assert layout["model.mm_projector.weight"].shape == (32, 8)
    file = read_projector(tmp_path / "p.bin")
    assert file.info.encoder == {}
    assert torch.equal(file.token_embeddings["im_end"], word_embeddings(model).weight[99])
    fresh = chatbind()
    load_into(fresh, file, "p")
    assert torch.equal(fresh.soft_tokens(torch.ones(1, 8)), model.soft_tokens(torch.ones(1, 8)))


def test_several_tokens_of_their_own_have_no_published_layout(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no room for 2 tokens.*write a \.safetensors file"):
        write_projector(tmp_path / "p.bin", projector_of(chatbind(tokens_per_embedding=2)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("weight", "projector.layers.0.weight"),
        ("mm_projector.bias", "projector.layers.0.bias"),
        ("model.mm_projector.weight", "projector.layers.0.weight"),
        ("model.mm_projector.2.bias", "projector.layers.2.bias"),
        ("base_model.model.projector.layers.2.weight", "projector.layers.2.weight"),
        ("model.layers.0.mlp.up_proj.weight", None),
        ("language_model.lm_head.weight", None),
        ("projector.layers.1.weight", None),
        ("mm_projector.weight.scale", None),
    ],
)
def test_every_spelling_is_known(name: str, ours: str | None) -> None:
    assert projector_key(name) == ours


@pytest.mark.parametrize("prefix", ["", "mm_projector.", "model.mm_projector."])
def test_files_of_other_makers_are_read(prefix: str, tmp_path: Path) -> None:
    tensors = {f"{prefix}weight": torch.randn(16, 8), f"{prefix}bias": torch.randn(16)}
    torch.save(tensors, tmp_path / "p.bin")
    file = read_projector(tmp_path / "p.bin")
    assert (file.info.embedding_dim, file.info.hidden_size) == (8, 16)
    assert torch.equal(file.tensors["projector.layers.0.bias"], tensors[f"{prefix}bias"])


def test_a_whole_models_safetensors_gives_its_projector(tmp_path: Path) -> None:
    chatbind().save_pretrained(tmp_path)
    file = read_projector(tmp_path / "model.safetensors")
    assert file.info.projector_type == "linear"
    assert set(file.tensors) == {"projector.layers.0.weight", "projector.layers.0.bias"}


def test_the_published_target_has_a_projector(golden: Path) -> None:
    tensors = torch.load(golden / "delta" / "target" / "pytorch_model.bin", weights_only=True)
    file = projector_from_tensors(tensors, where="target")
    assert (file.info.embedding_dim, file.info.hidden_size) == (1024, 32)
    assert torch.equal(file.token_embeddings["im_end"], tensors["model.embed_tokens.weight"][-1])


def test_files_that_are_no_projector_are_refused_in_one_line(tmp_path: Path) -> None:
    bad = {
        "text.bin": b"hello",
        "empty.bin": b"",
        "text.safetensors": b"hello",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match="is neither|not a valid") as caught:
            read_projector(tmp_path / name)
        assert "\n" not in str(caught.value)
    save_file({"lm_head.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors: no projector in it"):
        read_projector(tmp_path / "other.safetensors")
    save_file({"mm_projector.weight": torch.ones(2, 2)}, tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match=r"no projector\.layers\.0\.bias"):
        read_projector(tmp_path / "half.safetensors")
    torch.save([torch.ones(1)], tmp_path / "list.bin")
    with pytest.raises(WeightsError, match="no dictionary of named tensors"):
        read_projector(tmp_path / "list.bin")
    with pytest.raises(CheckpointError, match="no such projector file; extract-projector"):
        read_projector(tmp_path)
    with pytest.raises(CheckpointError, match=r"is \.safetensors or \.bin"):
        write_projector(tmp_path / "p.pt", projector_of(chatbind()))


class Touch:
    """Unpickles to a call: what a malicious file would do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_malicious_pickle_runs_nothing(tmp_path: Path) -> None:
    torch.save({"weight": Touch(tmp_path / "owned")}, tmp_path / "p.bin")
    with pytest.raises(WeightsError, match="which is no tensor, and loading it could run code"):
        read_projector(tmp_path / "p.bin")
    assert not (tmp_path / "owned").exists()


def test_shapes_that_do_not_fit_are_named() -> None:
    file = projector_of(chatbind())
    with pytest.raises(CheckpointError, match=r"layers\.0\.weight is \[32, 8\].*wants \[32, 12\]"):
        load_into(chatbind(embedding_dim=12), file, "p.safetensors")


def test_a_projector_with_numbers_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    weight = torch.zeros(4, 8)
    weight[1, 2] = float("nan")
    path = tmp_path / "p.bin"
    torch.save({"mm_projector.weight": weight, "mm_projector.bias": torch.zeros(4)}, path)
    with pytest.raises(CheckpointError, match="mm_projector.weight holds numbers that are not"):
        read_projector(path)

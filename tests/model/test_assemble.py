"""Building a ChatBind model from a language model, and opening saved ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatbind_cli.checkpoints.projector_file import write_projector
from chatbind_cli.errors import ChatBindError, CheckpointError, UsageError
from chatbind_cli.model.assemble import build_chatbind
from chatbind_cli.model.chatbind import word_embeddings
from chatbind_cli.model.config import EncoderInfo, check_encoder
from chatbind_cli.model.loading import load_chatbind, projector_of
from tests.model.tiny import (
    LANGUAGE_MODELS,
    byte_tokenizer,
    save_chatbind,
    save_language_model,
    word_tokenizer,
)

ENCODER = EncoderInfo(name="small", sha256="ab" * 32, embedding_dim=8, path="/enc")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_language_model(tmp_path / "lm")


def test_a_built_model_carries_its_whole_identity(base: Path, tmp_path: Path) -> None:
    built = build_chatbind(
        base,
        encoder=ENCODER,
        tokens_per_embedding=2,
        prompt_style="vicuna_v1_1",
        media_options={"clip_sampler": "imagebind"},
        command="chatbind pretrain ...",
    )
    save_chatbind(built, tmp_path / "model")
    config = load_chatbind(tmp_path / "model").config
    assert config.encoder == {
        "name": "small", "sha256": "ab" * 32, "embedding_dim": 8, "path": "/enc",
    }  # fmt: skip
    assert (config.stage, config.prompt_style) == ("pretrain", "vicuna_v1_1")
    assert config.media_options == {"clip_sampler": "imagebind"}
    assert config.provenance["command"] == "chatbind pretrain ..."
    assert config.provenance["language_model"]["name"] == str(base)
    assert len(config.provenance["language_model"]["fingerprint"]) == 64
    assert set(config.provenance["versions"]) == {"chatbind", "torch", "transformers"}
    assert config.medium_ids()[0] == built.tokenizer.convert_tokens_to_ids("<im_start>")


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_any_language_model_will_do(kind: str, tmp_path: Path) -> None:
    folder = save_language_model(tmp_path / "lm", kind)
    built = build_chatbind(folder, encoder=ENCODER)
    save_chatbind(built, tmp_path / "model")
    opened = load_chatbind(tmp_path / "model")
    ids = torch.tensor([[5, *opened.config.medium_ids(), 6]])
    media = torch.randn(1, 8)
    torch.testing.assert_close(
        opened.model(ids, media_embeddings=media).logits,
        built.model.eval()(ids, media_embeddings=media).logits,
        atol=1e-6,
        rtol=1e-5,
    )
    assert not opened.model.training


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_new_tokens_start_as_the_mean_and_old_ones_stay(kind: str, tmp_path: Path) -> None:
    folder = save_language_model(tmp_path / "lm", kind)
    before = AutoModelForCausalLM.from_pretrained(folder)
    built = build_chatbind(folder, encoder=ENCODER, prompt_style="chat").model
    known = before.get_input_embeddings().num_embeddings
    for old, new in (
        (before.get_input_embeddings(), built.get_input_embeddings()),
        (before.get_output_embeddings(), built.get_output_embeddings()),
    ):
        assert torch.equal(new.weight[:known], old.weight)
        mean = old.weight.mean(dim=0).expand(3, -1)
        torch.testing.assert_close(new.weight[known:], mean, atol=1e-6, rtol=1e-5)


def test_a_vocabulary_with_spare_rows_keeps_its_size(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    folder = save_language_model(tmp_path / "lm")
    from tests.model.tiny import language_model

    language_model("llama", len(tokenizer) + 61).save_pretrained(folder)
    built = build_chatbind(folder, encoder=ENCODER)
    assert word_embeddings(built.model).num_embeddings == len(tokenizer) + 61


def test_a_fresh_projector_makes_tokens_as_large_as_words(base: Path) -> None:
    torch.manual_seed(0)
    built = build_chatbind(base, encoder=ENCODER).model
    soft = built.soft_tokens(torch.randn(200, 8))
    words = word_embeddings(built).weight[:-3]
    # 256 weights make the estimate itself uncertain by about 5 %
    assert soft.std().item() == pytest.approx(words.std().item(), rel=0.2)


def test_the_first_projector_is_the_same_whatever_the_base_is_held_in(base: Path) -> None:
    first = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        built = build_chatbind(base, encoder=ENCODER, dtype=dtype).model
        assert built.language_model.dtype == dtype
        first.append(built.projector.layers[0].weight)
    assert torch.equal(*first)


def test_a_projector_file_decides_what_is_not_said(base: Path, tmp_path: Path) -> None:
    first = build_chatbind(
        base,
        encoder=ENCODER,
        projector_type="mlp2x_gelu",
        tokens_per_embedding=3,
        prompt_style="chat",
        use_start_end=False,
    )
    write_projector(tmp_path / "p.safetensors", projector_of(first.model))
    second = build_chatbind(
        base, encoder=ENCODER, projector=tmp_path / "p.safetensors", stage="finetune"
    )
    for name in ("projector_type", "tokens_per_embedding", "prompt_style", "use_start_end"):
        assert getattr(second.config, name) == getattr(first.config, name)
    assert second.config.stage == "finetune"
    media = torch.randn(2, 8)
    assert torch.equal(second.model.soft_tokens(media), first.model.soft_tokens(media))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"encoder": EncoderInfo(name="big", sha256=None, embedding_dim=9)},
            "width 8.*big gives 9",
        ),
        (
            {"encoder": EncoderInfo(name="other", sha256="cd" * 32, embedding_dim=8)},
            r"trained with the encoder small \(abababababab\), not with other \(cdcdcdcdcdcd\)",
        ),
        ({"tokens_per_embedding": 2}, "tokens_per_embedding is 1, not 2"),
        ({"projector_type": "mlp2x_gelu"}, "projector_type is linear, not mlp2x_gelu"),
    ],
)
def test_a_projector_that_does_not_fit_is_refused(
    base: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_projector(
        tmp_path / "p.safetensors", projector_of(build_chatbind(base, encoder=ENCODER).model)
    )
    with pytest.raises(CheckpointError, match=message):
        build_chatbind(base, projector=tmp_path / "p.safetensors", **{"encoder": ENCODER, **change})


def test_a_projector_of_another_language_model_is_refused(base: Path, tmp_path: Path) -> None:
    write_projector(
        tmp_path / "p.safetensors", projector_of(build_chatbind(base, encoder=ENCODER).model)
    )
    narrow = save_language_model(tmp_path / "opt", "opt")
    with pytest.raises(CheckpointError, match=r"tokens of width 32, the language model reads 16"):
        build_chatbind(narrow, encoder=ENCODER, projector=tmp_path / "p.safetensors")


def test_the_encoder_of_a_model_is_checked(base: Path) -> None:
    config = build_chatbind(base, encoder=ENCODER).config
    check_encoder(config, ENCODER)
    check_encoder(config, EncoderInfo(name="moved", sha256=None, embedding_dim=8))
    with pytest.raises(CheckpointError, match=r"reads embeddings of width 8.*--encoder"):
        check_encoder(config, EncoderInfo(name="x", sha256=None, embedding_dim=7))
    with pytest.raises(CheckpointError, match="not with x"):
        check_encoder(config, EncoderInfo(name="x", sha256="00" * 32, embedding_dim=8))


def test_types_and_kernels_pass_through(base: Path, tmp_path: Path) -> None:
    built = build_chatbind(base, encoder=ENCODER, dtype=torch.bfloat16, attn_implementation="eager")
    assert {p.dtype for p in built.model.language_model.parameters()} == {torch.bfloat16}
    assert built.model.language_model.config._attn_implementation == "eager"
    save_chatbind(built, tmp_path / "model")
    assert load_chatbind(tmp_path / "model").model.dtype == torch.bfloat16
    opened = load_chatbind(tmp_path / "model", dtype=torch.float32, attn_implementation="eager")
    assert opened.model.dtype == torch.float32
    assert opened.model.language_model.config._attn_implementation == "eager"


@pytest.mark.parametrize("wanted", ["sdpa", "flash_attention_2"])
def test_a_model_without_the_kernels_goes_on_as_transformers_has_it(
    tmp_path: Path, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_language_model(tmp_path / "lm", "bloom")
    built = build_chatbind(base, encoder=ENCODER, attn_implementation=wanted)
    assert built.model.language_model.config._attn_implementation == "eager"
    told = "a bloom model has no flash attention" in capsys.readouterr().err
    assert told == (wanted != "sdpa")


def test_the_saved_tokenizer_loads_with_auto_tokenizer(tmp_path: Path) -> None:
    base = save_language_model(tmp_path / "lm", tokenizer=word_tokenizer())
    built = build_chatbind(base, encoder=ENCODER, prompt_style="v0")
    save_chatbind(built, tmp_path / "model")
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again.pad_token == "[PAD]"
    assert again.get_vocab() == built.tokenizer.get_vocab()
    assert again.decode(again("Hello <im_start> x").input_ids, skip_special_tokens=True)


def spoil_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def drop_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["projector.layers.0.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_weights, "holds no weights"),
        (cut_weights, "not a valid safetensors file"),
        (drop_tensor, r"1 tensors are missing, the first is projector\.layers\.0\.bias"),
        (lambda f: spoil_config(f, embedding_dim=9), "cannot be opened|missing"),
        (lambda f: spoil_config(f, im_patch_id=3), "config.json says im_patch_id = 3"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: spoil_config(f, stage="fourth"), "stage is 'fourth'"),
    ],
)
def test_a_broken_folder_is_one_clear_line(
    base: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    save_chatbind(build_chatbind(base, encoder=ENCODER), tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(ChatBindError, match=message) as caught:
        load_chatbind(tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "model") in str(caught.value) or "stage" in message


def test_a_bare_language_model_is_no_chatbind_model_and_the_other_way_round(
    base: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="is no ChatBind model but llama"):
        load_chatbind(base)
    save_chatbind(build_chatbind(base, encoder=ENCODER), tmp_path / "model")
    with pytest.raises(CheckpointError, match="is a ChatBind model, not a bare language model"):
        build_chatbind(tmp_path / "model", encoder=ENCODER)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        build_chatbind(tmp_path / "nowhere", encoder=ENCODER)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_chatbind(tmp_path / "nowhere")


def test_an_unknown_style_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no prompt style"):
        build_chatbind(tmp_path / "nowhere", encoder=ENCODER, prompt_style="v7")


def test_loading_and_saving_draw_nothing_on_a_log(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    save_chatbind(build_chatbind(base, encoder=ENCODER), tmp_path / "model")
    load_chatbind(tmp_path / "model")
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)

"""Folders in the published layout, made small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from chatbind_cli.errors import CheckpointError
from chatbind_cli.model.assemble import build_chatbind
from chatbind_cli.model.config import EncoderInfo
from chatbind_cli.model.loading import load_chatbind
from chatbind_cli.model.tokenizer import prepare_tokenizer
from tests.model.tiny import save_chatbind, word_tokenizer

# two layers of golden/delta: hidden size 32, a vocabulary of 132 = 128 + the four tokens of v0
VOCABULARY, ADDED = 128, 4


def small_tokenizer(folder: Path, *, pad: bool) -> None:
    """A LLaMA-like tokenizer whose added tokens fill the published vocabulary exactly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *[f"▁w{i}" for i in range(VOCABULARY - 3)]]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    prepare_tokenizer(fast, pad_token="[PAD]" if pad else None)
    assert len(fast) == VOCABULARY + ADDED - (not pad)
    fast.save_pretrained(folder)


@pytest.fixture
def published(golden: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "chatbind-7b"
    shutil.copytree(golden / "delta" / "target", folder)
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
    small_tokenizer(folder, pad=True)
    return folder


def test_a_published_folder_opens_as_it_is(published: Path) -> None:
    opened = load_chatbind(published, dtype=torch.float32)
    config = opened.config
    assert (config.stage, config.prompt_style) == ("published", "multimodal")
    assert config.normalize_embeddings is False
    assert config.media_options == {"clip_sampler": "chatbind"}
    assert (config.im_patch_id, config.im_start_id, config.im_end_id) == (129, 130, 131)
    assert config.text_config.vocab_size == 132


def test_its_projector_and_words_are_the_files(published: Path) -> None:
    tensors = torch.load(published / "pytorch_model.bin", weights_only=True)
    model = load_chatbind(published, dtype=torch.float32).model
    vector = torch.randn(1, 1024) * 20  # with the scale of sounds still on it
    by_hand = functional.linear(
        vector,
        tensors["model.mm_projector.weight"].float(),
        tensors["model.mm_projector.bias"].float(),
    )
    torch.testing.assert_close(model.soft_tokens(vector)[:, 0], by_hand)
    words = model.get_input_embeddings().weight
    assert torch.equal(words, tensors["model.embed_tokens.weight"].float())
    ids = torch.tensor([[1, 5, *model.config.medium_ids(), 7]])
    assert torch.isfinite(model(ids, media_embeddings=vector).logits).all()


@pytest.mark.parametrize("layout", ["safetensors", "bin", "legacy"])
def test_shards_of_every_kind_open_too(golden: Path, published: Path, layout: str) -> None:
    whole = torch.load(published / "pytorch_model.bin", weights_only=True)
    (published / "pytorch_model.bin").unlink()
    if layout == "safetensors":
        for path in (golden / "delta" / "target_sharded_safetensors").iterdir():
            if path.name != "config.json":
                shutil.copy(path, published)
    else:
        save_bin_shards(published, whole, zipped=layout == "bin")
    model = load_chatbind(published, dtype=torch.float32).model
    weight = model.projector.state_dict()["layers.0.weight"]
    assert torch.equal(weight, whole["model.mm_projector.weight"].float())


def save_bin_shards(folder: Path, tensors: dict[str, torch.Tensor], *, zipped: bool) -> None:
    """Two files and an index, as `save_pretrained` of old wrote them."""
    weight_map = {}
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        part = {name: tensors[name] for name in names}
        torch.save(part, folder / file, _use_new_zipfile_serialization=zipped)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["llava_image_bind_select_all", "llava"])
def test_the_other_published_kinds_open_too(published: Path, kind: str) -> None:
    change_config(published, model_type=kind)
    assert load_chatbind(published).config.stage == "published"


def test_a_llava_of_transformers_is_another_thing(published: Path) -> None:
    change_config(published, model_type="llava", text_config={}, vision_config={})
    with pytest.raises(CheckpointError, match="is no ChatBind model but llava"):
        load_chatbind(published)


def test_the_projectors_own_width_counts_and_not_the_configs(published: Path) -> None:
    path = published / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    tensors["model.mm_projector.weight"] = torch.zeros(32, 48).half()
    torch.save(tensors, path)
    assert load_chatbind(published).config.embedding_dim == 48


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("layout", ["delta_bin", "delta_bin_sharded", "delta_sharded_safetensors"])
def test_a_delta_that_was_never_applied_is_told_apart(
    golden: Path, published: Path, layout: str
) -> None:
    (published / "pytorch_model.bin").unlink()
    for path in (golden / "delta" / layout).iterdir():
        shutil.copy(path, published)
    with pytest.raises(CheckpointError, match=r"never applied.*chatbind apply-delta"):
        load_chatbind(published)


def test_finetuning_goes_on_from_it(published: Path) -> None:
    encoder = EncoderInfo(name="huge", sha256="5" * 64, embedding_dim=1024)
    opened = load_chatbind(published, dtype=torch.float32)
    bundle = build_chatbind(published, encoder=encoder, stage="finetune", dtype=torch.float32)
    assert bundle.config.stage == "finetune"
    assert bundle.config.prompt_style == "multimodal"
    assert bundle.config.normalize_embeddings is False
    assert bundle.config.encoder["sha256"] == "5" * 64
    vector = torch.randn(1, 1024)
    assert torch.equal(bundle.model.soft_tokens(vector), opened.model.soft_tokens(vector))
    with pytest.raises(CheckpointError, match="tokens_per_embedding is 1, not 4"):
        build_chatbind(published, encoder=encoder, stage="finetune", tokens_per_embedding=4)


def test_a_repeated_feature_is_several_equal_tokens(published: Path) -> None:
    config = published / "config.json"
    config.write_text(config.read_text().replace("{", '{"repeat_feature_dim": 4, ', 1))
    model = load_chatbind(published, dtype=torch.float32).model
    soft = model.soft_tokens(torch.randn(1, 1024))
    assert soft.shape == (1, 4, 32)
    assert torch.equal(soft[0, 0], soft[0, 3])


def test_a_vocabulary_without_padding_token_is_v1(published: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (published / name).unlink()
    small_tokenizer(published, pad=False)
    assert load_chatbind(published).config.prompt_style == "llava_v1"


def test_saved_again_it_is_a_folder_of_ours(published: Path, tmp_path: Path) -> None:
    opened = load_chatbind(published, dtype=torch.float32)
    save_chatbind(opened, tmp_path / "ours")
    again = load_chatbind(tmp_path / "ours")
    assert again.config.stage == "published"
    vector = torch.randn(1, 1024)
    assert torch.equal(again.model.soft_tokens(vector), opened.model.soft_tokens(vector))


def test_a_tokenizer_with_too_many_tokens_is_refused(published: Path) -> None:
    word_tokenizer().save_pretrained(published)
    with pytest.raises(CheckpointError, match=r"tokens, the model 132 embeddings"):
        load_chatbind(published)


def test_without_a_tokenizer_it_says_so(published: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (published / name).unlink()
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        load_chatbind(published)


def test_without_a_projector_it_says_so(golden: Path, published: Path) -> None:
    path = published / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    torch.save({k: t for k, t in tensors.items() if "mm_projector" not in k}, path)
    with pytest.raises(CheckpointError, match="has no projector"):
        load_chatbind(published)


def test_it_is_no_bare_language_model(published: Path) -> None:
    encoder = EncoderInfo(name="huge", sha256=None, embedding_dim=1024)
    with pytest.raises(CheckpointError, match="is a ChatBind model"):
        build_chatbind(published, encoder=encoder)

"""The configuration: what it keeps, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, LlamaConfig, Qwen2Config

from chatbind_cli.errors import CheckpointError
from chatbind_cli.model.chatbind import ChatBindConfig


def test_everything_survives_the_folder(tmp_path: Path) -> None:
    config = ChatBindConfig(
        text_config=Qwen2Config(vocab_size=77, tie_word_embeddings=True),
        embedding_dim=12,
        tokens_per_embedding=3,
        prompt_style="chat",
        im_patch_id=70,
        encoder={"name": "small", "sha256": "ab"},
        media_options={"clip_sampler": "imagebind"},
        provenance={"command": "chatbind pretrain"},
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, ChatBindConfig)
    assert isinstance(again.text_config, Qwen2Config)
    assert again.get_text_config().vocab_size == 77
    assert again.tie_word_embeddings is True
    for name in ("embedding_dim", "tokens_per_embedding", "prompt_style", "im_patch_id"):
        assert getattr(again, name) == getattr(config, name)
    assert again.encoder == {"name": "small", "sha256": "ab"}
    assert again.provenance == {"command": "chatbind pretrain"}


def test_one_medium_is_patches_between_start_and_end() -> None:
    ids = {"im_patch_id": 7, "im_start_id": 8, "im_end_id": 9}
    config = ChatBindConfig(text_config=LlamaConfig(), tokens_per_embedding=2, **ids)
    assert config.medium_ids() == [8, 7, 7, 9]
    config.use_start_end = False
    assert config.medium_ids() == [7, 7]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("projector_type", "resampler", "projector_type is 'resampler'; it must be one of linear"),
        ("projector_layout", "both", "projector_layout is 'both'"),
        ("stage", "third", "stage is 'third'"),
        ("tokens_per_embedding", 0, "tokens_per_embedding is 0"),
    ],
)
def test_values_that_nobody_writes_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ChatBindConfig(text_config=LlamaConfig(), **{field: value})


def test_an_unknown_kind_of_language_model_is_named() -> None:
    with pytest.raises(CheckpointError, match="of the kind 'hal9000'"):
        ChatBindConfig(text_config={"model_type": "hal9000"})


def test_ids_that_are_missing_are_named() -> None:
    with pytest.raises(CheckpointError, match="no im_patch_id"):
        ChatBindConfig(text_config=LlamaConfig()).medium_ids()
    with pytest.raises(CheckpointError, match="no im_start_id"):
        ChatBindConfig(text_config=LlamaConfig(), im_patch_id=3).medium_ids()

"""Tiny random repositories of models that know sound and films."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    PeAudioFeatureExtractor,
    PeAudioVideoConfig,
    PeAudioVideoModel,
    PeAudioVideoProcessor,
    PeVideoVideoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TimmWrapperConfig,
)

from chatbind_cli.model.pretrained import quiet_transformers

E = TypeVar("E")

SIDE, HOP, RATE = 32, 32, 8000

_WORDS = (
    "a",
    "dog",
    "car",
    "bird",
    "sings",
    "the",
    "red",
    "task:",
    "classification",
    "|",
    "query:",
)
_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
}


def opened(kind: Callable[..., E], folder: Path) -> E:
    """An encoder of a kind, on the CPU."""
    return kind(
        folder,
        reference=str(folder),
        device=torch.device("cpu"),
        dtype=torch.float32,
        batch_size=16,
        attn_implementation="auto",
    )


def save_pe_audio_video(folder: Path, frames: int | None = 4, **config: Any) -> PeAudioVideoModel:
    """Saves PE-AV with random weights; returns the model."""
    tokenizer = _tokenizer("[PAD]", "[CLS]", "[SEP]", "[UNK]")
    text = {
        "model_type": "modernbert",
        "hidden_size": 12,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "cls_token_id": 1,
        "bos_token_id": 1,
        "sep_token_id": 2,
        "eos_token_id": 2,
    }
    codec = {"encoder_hidden_size": 2, "downsampling_ratios": [2, 4, 4], "codebook_dim": 6}
    vision = TimmWrapperConfig.from_dict(
        {
            "architecture": "vit_pe_core_tiny_patch16_384",
            "num_classes": 10,
            "model_args": {"img_size": SIDE, "embed_dim": 16, "depth": 1, "num_heads": 2},
        }
    )
    model = PeAudioVideoModel(
        PeAudioVideoConfig(
            text_config=text,
            audio_video_config={
                **_SIZES,
                "audio_config": {**_SIZES, "dac_config": {"model_type": "dac", **codec}},
                "video_config": {**_SIZES, "vision_config": vision},
            },
            **config,
        )
    )
    _save(model, folder)
    size = {"height": SIDE, "width": SIDE}
    PeAudioVideoProcessor(
        feature_extractor=PeAudioFeatureExtractor(sampling_rate=RATE, hop_length=HOP),
        video_processor=PeVideoVideoProcessor(
            size=size,
            do_resize=True,
            do_sample_frames=frames is not None,
            num_frames=frames,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return model


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Saves a model whose every parameter was drawn: zeros and ones would hide mistakes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    with quiet_transformers():
        model.eval().save_pretrained(folder)


def _tokenizer(pad: str, first: str, last: str, unknown: str, **special: str) -> Any:
    words = [pad, first, last, unknown, *special.values(), *_WORDS]
    ids = {word: number for number, word in enumerate(words)}
    words_alone = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    words_alone.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words_alone.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(first, 1), (last, 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words_alone,
        pad_token=pad,
        bos_token=first,
        eos_token=last,
        cls_token=first,
        sep_token=last,
        unk_token=unknown,
        extra_special_tokens=special,
    )

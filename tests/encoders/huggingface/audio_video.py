"""Tiny random repositories of models that know sound and films."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
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

from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import open_source
from chatbind_cli.media.video import read_frames
from chatbind_cli.model.pretrained import quiet_transformers

SIDE, HOP, RATE = 32, 32, 8000
PROMPTS = {"Classification": "task: classification | query: "}

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


def with_weights(folder: Path, copy: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A copy of a repository with other weights: what was opened maps the file of the first.

    Numbers that lie elsewhere in a file are aligned otherwise, and round a little otherwise.
    """
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


def frames_of(data: bytes) -> np.ndarray:
    """All frames of a film, as the library reads them."""
    source = open_source(data)
    everything = read_frames(source, MediaOptions(), lambda total, _: range(total), np.array)
    return np.stack(everything)


def noise(seed: int, size: tuple[int, int]) -> np.ndarray:
    """A picture [height, width, 3] of two by two colours that run into each other."""
    coarse = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))


def png(picture: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG")
    return data.getvalue()


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
            do_rescale=True,
            do_normalize=True,
            do_convert_rgb=True,
            do_sample_frames=frames is not None,
            num_frames=frames,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return model


def save_embedding_gemma2(
    folder: Path, *, vision: bool = True, audio: bool = True
) -> PreTrainedModel:
    """Saves EmbeddingGemma 2 with random weights; returns the model."""
    from transformers import (
        EmbeddingGemma2Config,
        EmbeddingGemma2Model,
        EmbeddingGemma2Processor,
        EmbeddingGemma2VideoProcessor,
        Gemma4AudioFeatureExtractor,
        Gemma4ImageProcessor,
    )

    special = {
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "image_token": "<|image|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
        "audio_token": "<|audio|>",
        "video_token": "<|video|>",
    }
    tokenizer = _tokenizer("<pad>", "<bos>", "<eos>", "<unk>", **special)
    ids = tokenizer.convert_tokens_to_ids
    sizes = {**_SIZES, "num_hidden_layers": 1, "num_key_value_heads": 2}
    pictures = {**sizes, "patch_size": 2, "pooling_kernel_size": 3, "position_embedding_size": 256}
    text = {**sizes, "num_hidden_layers": 2, "global_head_dim": 8, "sliding_window_pattern": 2}
    text |= {"sliding_window": 4, "hidden_size_per_layer_input": 4, "embedding_dim": 12}
    sounds = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sounds |= {"output_proj_dims": 12, "subsampling_conv_channels": [8, 4], "conv_kernel_size": 3}
    config = EmbeddingGemma2Config(
        text_config={**text, "vocab_size": len(tokenizer), "max_position_embeddings": 4096},
        vision_config={"model_type": "gemma4_vision", **pictures} if vision else None,
        audio_config={"model_type": "gemma4_audio", **sounds} if audio else None,
        **{
            f"{name}{'_index' if name == 'eoa_token' else '_id'}": ids(word)
            for name, word in special.items()
        },
    )
    model = EmbeddingGemma2Model(config)
    _save(model, folder)
    budget = {"patch_size": 2, "max_soft_tokens": 70}
    EmbeddingGemma2Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(feature_size=8),
        image_processor=Gemma4ImageProcessor(**budget),
        tokenizer=tokenizer,
        video_processor=EmbeddingGemma2VideoProcessor(**budget),
    ).save_pretrained(folder)
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": PROMPTS}))
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

"""Encoders of every kind with random weights, and what others make of a picture with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    EmbeddingGemma2Config,
    EmbeddingGemma2Model,
    EmbeddingGemma2Processor,
    EmbeddingGemma2VideoProcessor,
    Gemma4AudioFeatureExtractor,
    Gemma4ImageProcessor,
    PeAudioFeatureExtractor,
    PeAudioVideoConfig,
    PeAudioVideoModel,
    PeAudioVideoProcessor,
    PeVideoEncoder,
    PeVideoVideoProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    ViTImageProcessor,
)
from transformers.models.pe_audio_video.modeling_pe_audio_video import PeAudioVideoContrastiveHead

from chatbind_cli.encoders.imagebind.config import HUGE, TOWERS
from chatbind_cli.encoders.imagebind.weights import expected_shapes

See = Callable[[Image.Image], torch.Tensor]

_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
_VISION = {**_LARGE, "num_attention_heads": 16, "patch_size": 14, "image_size": 224}
_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
CLIP = {"projection_dim": 768, "vision_config": _VISION, "text_config": _TEXT}


def save_random(shapes: Mapping[str, torch.Size | tuple[int, ...]], folder: Path) -> None:
    """Writes weights of these shapes."""
    made = {
        name: torch.randn(shape) * 0.02 if shape else torch.ones(())
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})


def save_model(kind: Any, config: Any, folder: Path) -> None:
    """Writes a model of transformers with random weights."""
    with torch.device("meta"):
        model = kind(config)
    tied = set(model.all_tied_weights_keys)
    save_random({n: p.shape for n, p in model.state_dict().items() if n not in tied}, folder)
    config.architectures = [kind.__name__]
    config.save_pretrained(folder)


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One that knows a few tokens; no text is encoded here."""
    ids = {word: number for number, word in enumerate(("<pad>", "<unk>", *special.values()))}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(ids, unk_token="<unk>")),
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=special,
    )


def save_imagebind(folder: Path) -> None:
    """ImageBind-Huge."""
    save_random(expected_shapes(HUGE, TOWERS), folder)


def save_languagebind(folder: Path) -> None:
    """LanguageBind's repositories of pictures and of sound, of CLIP's ViT-L/14."""
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in CLIPModel(CLIPConfig(**CLIP)).state_dict().items()}
    text = {**_TEXT, "hidden_act": "gelu", "vocab_size": 49408}
    vision = {**_VISION, "hidden_act": "gelu", "lora_r": 0}
    for modality in ("image", "audio"):
        if modality == "audio":
            vision |= {"num_mel_bins": 112, "target_length": 1036}
            shapes["vision_model.embeddings.position_embedding.weight"] = torch.Size((593, 1024))
        part = folder / f"LanguageBind_{modality.capitalize()}"
        save_random(shapes, part)
        said = {"model_type": f"LanguageBind{modality.capitalize()}", "projection_dim": 768}
        said |= {"vision_config": vision, "text_config": text}
        (part / "config.json").write_text(json.dumps(said))


def save_clip(folder: Path) -> None:
    """CLIP ViT-L/14."""
    save_model(CLIPModel, CLIPConfig(**CLIP), folder)
    CLIPImageProcessor().save_pretrained(folder)


def save_siglip(folder: Path) -> None:
    """SigLIP base, 16 x 16 patches of 224 x 224 pixels."""
    save_model(SiglipModel, SiglipConfig(), folder)
    SiglipImageProcessor(size={"height": 224, "width": 224}).save_pretrained(folder)


def save_dinov2(folder: Path) -> None:
    """DINOv2 base."""
    save_model(Dinov2Model, Dinov2Config(), folder)
    ViTImageProcessor().save_pretrained(folder)


def save_timm(folder: Path) -> None:
    """A ViT-L/14 of timm."""
    name = "vit_large_patch14_clip_224"
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    save_random({n: p.shape for n, p in model.state_dict().items()}, folder)
    said = {"architecture": name, "num_classes": 0, "num_features": 1024}
    said["pretrained_cfg"] = {"input_size": [3, 224, 224], "interpolation": "bicubic"}
    said["pretrained_cfg"] |= {"crop_pct": 1.0, "num_classes": 0, "mean": [0.5] * 3}
    said["pretrained_cfg"] |= {"std": [0.5] * 3}
    (folder / "config.json").write_text(json.dumps(said))


def pe_av_config() -> Any:
    """The defaults; transformers forgets how wide frames are when it puts them together."""
    config = PeAudioVideoConfig()
    vision: Any = config.audio_video_config.video_config.vision_config
    vision.num_labels = vision.num_classes = 1024
    return config


def save_pe_av(folder: Path) -> None:
    """PE-AV at the sizes of transformers' defaults, 16 frames."""
    save_model(PeAudioVideoModel, pe_av_config(), folder)
    size = {"height": 336, "width": 336}
    PeAudioVideoProcessor(
        feature_extractor=PeAudioFeatureExtractor(),
        video_processor=PeVideoVideoProcessor(
            size=size, do_resize=True, do_sample_frames=True, num_frames=16
        ),
        tokenizer=tokenizer(),
    ).save_pretrained(folder)


def save_gemma(folder: Path) -> None:
    """EmbeddingGemma 2 at the sizes of transformers' defaults."""
    special = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"}
    special |= {"boa_token": "<|audio>", "eoa_token": "<audio|>", "audio_token": "<|audio|>"}
    special |= {"video_token": "<|video|>"}
    words = tokenizer(**special)
    named = {n: n + ("_index" if n == "eoa_token" else "_id") for n in special}
    config = EmbeddingGemma2Config(
        vision_config={"model_type": "gemma4_vision"},
        audio_config={"model_type": "gemma4_audio"},
        **{named[n]: words.convert_tokens_to_ids(word) for n, word in special.items()},
    )
    save_model(EmbeddingGemma2Model, config, folder)
    EmbeddingGemma2Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessor(),
        tokenizer=words,
        video_processor=EmbeddingGemma2VideoProcessor(),
    ).save_pretrained(folder)


def by_transformers(folder: Path) -> See:
    """Processor and model of transformers, as its pages tell to call them."""
    processor = CLIPImageProcessor.from_pretrained(folder, trust_remote_code=False)
    if json.loads((folder / "config.json").read_text())["model_type"] != "clip":
        from transformers import AutoImageProcessor  # noqa: PLC0415

        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    model: Any = AutoModel.from_pretrained(folder, trust_remote_code=False).eval()
    ask = getattr(model, "get_image_features", model)

    def see(picture: Image.Image) -> torch.Tensor:
        made = ask(**processor(images=picture, return_tensors="pt"))
        return made.pooler_output

    return see


def by_clip(folder: Path) -> See:
    """What LanguageBind's picture tower is, as transformers has it."""
    processor = CLIPImageProcessor()
    vision = CLIPConfig(**CLIP).vision_config
    vision.hidden_act, vision.projection_dim = "gelu", 768
    model: Any = CLIPVisionModelWithProjection.from_pretrained(
        folder / "LanguageBind_Image", config=vision, trust_remote_code=False
    ).eval()
    return lambda picture: model(**processor(images=picture, return_tensors="pt")).image_embeds


def by_timm(folder: Path) -> See:
    """Timm's own model and transform."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    change: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return lambda picture: model(change(picture)[None])


def by_pe_av(folder: Path) -> See:
    """A picture as a film of 16 equal frames, by the tower of films and its head.

    The whole model cannot be read by transformers 5.23 (`bands is not an nn.Parameter`).
    """
    processor: Any = PeVideoVideoProcessor.from_pretrained(folder, trust_remote_code=False)
    config = pe_av_config().audio_video_config.video_config
    tower: Any = PeVideoEncoder(config)
    head: Any = PeAudioVideoContrastiveHead(config.hidden_size, 1024)
    state = load_file(folder / "model.safetensors")
    for module, place in ((tower, "video_encoder."), (head, "video_model.video_head.")):
        own = {n.rpartition(place)[2]: value for n, value in state.items() if place in n}
        missing, _ = module.load_state_dict(own, strict=False)
        assert not missing, missing
        module.eval()

    def see(picture: Image.Image) -> torch.Tensor:
        film = np.repeat(np.array(picture)[None], 16, axis=0)
        made = processor([film], do_sample_frames=False, return_tensors="pt")
        return head(tower(made["pixel_values_videos"]).pooler_output)

    return see


def by_gemma(folder: Path) -> See:
    """The processor's prompt of one picture, and the mean over all places."""
    processor: Any = EmbeddingGemma2Processor.from_pretrained(folder, trust_remote_code=False)
    model: Any = EmbeddingGemma2Model.from_pretrained(folder, trust_remote_code=False).eval()

    def see(picture: Image.Image) -> torch.Tensor:
        inputs = processor(text=processor.image_token, images=[picture], return_tensors="pt")
        return model(**inputs).last_hidden_state.mean(dim=1)

    return see


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], See] | None]] = {
    "imagebind": (save_imagebind, None),
    "languagebind": (save_languagebind, by_clip),
    "clip": (save_clip, by_transformers),
    "siglip": (save_siglip, by_transformers),
    "dinov2": (save_dinov2, by_transformers),
    "timm": (save_timm, by_timm),
    "pe-av": (save_pe_av, by_pe_av),
    "embedding-gemma-2": (save_gemma, by_gemma),
}

"""The toy PE-AV in training: an encoder in the Hugging Face layout, made of transformers' classes.

Its image tower is that of films: a picture is a film that stands still. Sounds go through a codec
that PE-AV takes as it is, and never trains; the toy's is set by hand to what an ear does, a bank of
filters and how loud each is. Texts and sounds beside films stay as they are drawn.
"""

from __future__ import annotations

import io
import math
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    PeAudioFeatureExtractor,
    PeAudioVideoConfig,
    PeAudioVideoModel,
    PeAudioVideoProcessor,
    PeVideoVideoProcessor,
)

from chatbind_cli.folders import replace_folder
from chatbind_cli.model.pretrained import quiet_transformers
from chatbind_cli.toy.binding import Tower, ToyEncoder, wobble
from chatbind_cli.toy.language import train_tokenizer

_WIDTH = 64
_SIDE, _PATCH = 32, 8  # pixels
_FRAMES = 2  # of a film, its first and its last

_RATE_HZ = 4000  # enough for the tones of a telephone
_STEP = 80  # samples
_BANDS = 12
_LOWEST_HZ, _HIGHEST_HZ = 650.0, 1530.0
_GAIN = 0.1  # a loud tone reaches the bend of the codec's sine
_LOUDNESS = 20.0  # so that a tone is larger than what the tower itself draws
_PHASES = 3  # the fewest whose squares add up to the same at any phase of a tone

_EACH_TOWER: dict[str, Any] = {
    "hidden_size": _WIDTH,
    "intermediate_size": 2 * _WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "head_dim": _WIDTH // 4,
    "initializer_range": 0.1,
}

_CODEC = {
    "downsampling_ratios": [_STEP],
    "encoder_hidden_size": _PHASES * _BANDS // 2,  # doubled where it takes a step
    "codebook_dim": _BANDS,
    "sampling_rate": _RATE_HZ,
}

_VISION: dict[str, Any] = {
    "model_type": "timm_wrapper",
    "architecture": "vit_pe_core_tiny_patch16_384",
    "num_labels": _WIDTH,
    "num_classes": _WIDTH,  # the same, where a file says it
    "do_pooling": True,
    "model_args": {
        "img_size": _SIDE,
        "patch_size": _PATCH,
        "ref_feat_shape": _SIDE // _PATCH,
        "embed_dim": _WIDTH,
        "depth": 2,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "attn_pool_num_heads": 4,
        "attn_pool_mlp_ratio": 2.0,
    },
}


def _config(words: int) -> PeAudioVideoConfig:
    text = {"model_type": "modernbert", "vocab_size": words, "max_position_embeddings": 128}
    ids = {f"{name}_token_id": number for number, name in enumerate(("pad", "bos", "eos"))}
    return PeAudioVideoConfig(
        text_config={**text, **_EACH_TOWER, **ids, "cls_token_id": 1, "sep_token_id": 2},
        audio_video_config={
            **_EACH_TOWER,
            "audio_config": {"model_type": "pe_audio_encoder", **_EACH_TOWER, "dac_config": _CODEC},
            "video_config": {
                "model_type": "pe_video_encoder", **_EACH_TOWER, "vision_config": _VISION
            },
        },
    )  # fmt: skip


class PeAvTower(Tower):
    """The tower of films and pictures, or of sounds, which come as the codec gives them."""

    dim = _WIDTH
    learning_rate = 1e-3
    encoder: Any

    def __init__(self, model: nn.Module, modality: str) -> None:
        super().__init__()
        side = "audio" if modality == "audio" else "video"
        self.encoder = model.get_submodule(f"{side}_model.{side}_encoder")
        self.head = model.get_submodule(f"{side}_model.{side}_head")
        self.codec: tuple[nn.Module, ...] = ()  # as a tuple it is none of this module's
        if side == "audio":
            embedder = self.encoder.embedder
            self.codec = (embedder.dac_encoder, embedder.bottleneck)
            embedder.dac_encoder = embedder.bottleneck = nn.Identity()

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Embeddings [b, d] of norm 1.

        Args:
            batch: image [b, 3, 32, 32]; video [b, 2, 3, 32, 32]; audio [b, 125, 12].
        """
        if batch.ndim == 4:
            batch = self.as_clips(batch)
        elif batch.ndim == 3:
            batch = batch.mT  # as the codec gives it
        return F.normalize(self.head(self.encoder(batch).pooler_output), dim=-1)

    def as_clips(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures [b, c, h, w] as films [b, frames, c, h, w]."""
        return torch.stack([pictures] * _FRAMES, dim=1)

    def varied(self, batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The same digits, recorded a little differently; a sound from another moment on.

        All frames of a film change in the same way.
        """
        if batch.ndim == 3:
            return batch.roll(int(torch.randint(batch.shape[1], (), generator=generator)), dims=1)
        return wobble(batch.flatten(1, -3), generator).view_as(batch)

    def finish(self) -> None:
        """Puts the codec back."""
        if self.codec:
            self.encoder.embedder.dac_encoder, self.encoder.embedder.bottleneck = self.codec


class ToyPeAv(ToyEncoder):
    """The toy PE-AV: images, films, sounds."""

    bound = ("audio",)
    epochs_factor = 3

    def __init__(self) -> None:
        self._tokenizer = train_tokenizer(seed=0)
        # transformers prints what the docstrings of one of these classes lack
        with quiet_transformers(), redirect_stdout(io.StringIO()):
            self.model: Any = PeAudioVideoModel(_config(len(self._tokenizer))).eval()
        embedder = self.model.audio_model.audio_encoder.embedder
        _set_codec(embedder)
        self._codec = nn.Sequential(embedder.dac_encoder, embedder.bottleneck)
        _wake(self.model.video_model.video_encoder.embedder.vision_model.timm_model)

    def tower(self, modality: str) -> Tower:
        """The tower for a modality."""
        return PeAvTower(self.model, modality)

    @torch.no_grad()
    def prepare(self, tensor: torch.Tensor, modality: str) -> torch.Tensor:
        """A film as the one clip that it is, [1, frames, c, h, w]; a sound through the codec."""
        if modality == "audio":
            return self._codec(tensor[None])[0].T.contiguous()
        return tensor[None] if modality == "video" else tensor

    def save(self, folder: Path) -> None:
        """Writes a repository: weights, config, processors, tokenizer."""
        processor = PeAudioVideoProcessor(
            feature_extractor=PeAudioFeatureExtractor(sampling_rate=_RATE_HZ, hop_length=_STEP),
            video_processor=PeVideoVideoProcessor(
                do_resize=True,
                size={"height": _SIDE, "width": _SIDE},
                do_rescale=True,
                do_normalize=True,
                do_sample_frames=True,
                num_frames=_FRAMES,
                image_mean=[0.5] * 3,
                image_std=[0.5] * 3,
            ),
            tokenizer=self._tokenizer,
        )
        with (
            replace_folder(folder, made_by="toy", overwrite=True) as temporary,
            quiet_transformers(),
        ):
            self.model.save_pretrained(temporary)
            processor.save_pretrained(temporary)


@torch.no_grad()
def _wake(tower: nn.Module) -> None:
    """Has the tower of frames see more than that paper is white: see `imagebind.py`."""
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    weight = tower.get_parameter("patch_embed.proj.weight")
    weight.sub_(weight.mean(dim=(-2, -1), keepdim=True)).mul_(0.1 / weight.std())
    nn.init.normal_(tower.get_parameter("pos_embed"))


@torch.no_grad()
def _set_codec(embedder: nn.Module) -> None:
    """Has the codec give how loud each band is, [bands] a step.

    A band has a windowed wave in each of three phases. The codec's activation adds to what a wave
    finds the square of its sine, and over the phases only the squares remain.
    """
    for name, parameter in embedder.named_parameters():
        if name.startswith(("dac_encoder.", "bottleneck.")):
            parameter.fill_(1e-6 if name.endswith("alpha") else 0.0)
    codec = embedder.get_submodule("dac_encoder")
    first, step, last = (
        codec.get_parameter(f"{name}.weight") for name in ("conv1", "block.0.conv1", "conv2")
    )
    first[0, 0, first.shape[-1] // 2] = 1.0
    length = step.shape[-1]
    wave = torch.arange(_PHASES * _BANDS)[:, None]
    hertz = torch.linspace(_LOWEST_HZ, _HIGHEST_HZ, _BANDS)[wave // _PHASES]
    phase = wave % _PHASES / _PHASES + torch.arange(length) / _RATE_HZ * hertz
    step[:, 0] = _GAIN * torch.hann_window(length) * (2 * math.pi * phase).cos()
    codec.get_parameter("snake1.alpha").fill_(1.0)
    last[:, :, 1] = torch.eye(len(last))
    sums = _LOUDNESS * torch.eye(_BANDS).repeat_interleave(_PHASES, dim=1)
    embedder.get_parameter("bottleneck.weight").copy_(sums[:, :, None])

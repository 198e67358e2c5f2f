"""PE-AV (Perception Encoder Audiovisual, Meta) as an encoder: sound, films, pictures, texts.

Embeddings are those of transformers' `PeAudioVideoModel`, as its heads give them: of any length.
Sound and films lie in one space. For texts the model has a head for each of the two, with a learned
scale.

What is looked at follows the repository's own processors. Films: `num_frames` spread evenly from
the first to the last (repositories named `-16-frame`); without it every frame, here at most
`MOST_FRAMES`, spread evenly. A picture is a film of one frame: the even spread shows that frame
`num_frames` times; without `num_frames` it is shown once. Sound: all of it, here at most the first
`MOST_SECONDS`; its last step is filled up by reflection.

Sources: transformers' classes `Pe*`; the processors' settings of facebook/pe-av-large and
pe-av-large-16-frame (336 x 336 pixels; 48 kHz, 1920 samples a step); Vyas et al., "Pushing the
Frontier of Audiovisual Perception with Large-Scale Multimodal Correspondence Learning", 2025.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import (
    AutoFeatureExtractor,
    AutoVideoProcessor,
    ModernBertModel,
    PeAudioEncoder,
    PeVideoEncoder,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.pe_audio_video.modeling_pe_audio_video import PeAudioVideoContrastiveHead

from chatbind_cli.checkpoints.checkpoint import open_checkpoint
from chatbind_cli.encoders.encoder import Decoded
from chatbind_cli.encoders.huggingface.inputs import (
    HEEDED,
    mask_of,
    read_film,
    read_sound,
    spread,
    text_ids,
)
from chatbind_cli.encoders.huggingface.repository import (
    HuggingFaceEncoder,
    load_part,
    open_processor,
)
from chatbind_cli.errors import WeightsError
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.pictures import open_rgb
from chatbind_cli.media.source import MediaSource
from chatbind_cli.model.pretrained import open_tokenizer

MOST_FRAMES = 64
"""Of a film of any length, where the repository does not say how many."""

MOST_SECONDS = 30
"""Of a sound of any length."""

_MOST_NUMBERS = 1 << 26
"""Of a film's tensor: 256 MiB."""

_CLIP_SECONDS = 2
"""Of sound that counts as a clip of a batch."""

_TEXT_OF_SOUND = "text beside audio"
"""As a modality: texts as sound is compared with them."""

_LEAST_RATE_HZ = 1000

_WORK = 10
"""Bytes a pixel on the way to a processor's tensor."""


@dataclass(frozen=True)
class Reader:
    """Reads media for PE-AV; may be sent to other processes.

    Args:
        folder: the repository, whose processors are used.
        frames: of a film; 0: as many as there are, up to `MOST_FRAMES`.
        rate_hz: samples a second of sound.
    """

    folder: Path
    frames: int
    rate_hz: int

    def __call__(self, source: MediaSource, modality: str, options: MediaOptions) -> torch.Tensor:
        """Reads one medium.

        Returns:
            float32: image [3, height, width]; video [frames, 3, height, width]; audio
            [1, samples].

        Raises:
            MediaError: it cannot be read.
        """
        if modality == "image":
            with open_rgb(source, options.max_pixels, work=_WORK) as picture:
                return self._see(np.array(picture))
        if modality == "video":
            frames = read_film(source, options, lambda n, s: self._choose(n, s, options), self._see)
            return torch.stack(frames)
        waveform = read_sound(source, options, self.rate_hz, most_seconds=MOST_SECONDS)
        extractor = open_processor(self.folder, AutoFeatureExtractor)
        found = extractor(
            [waveform.numpy()], sampling_rate=self.rate_hz, padding=True, return_tensors="pt"
        )
        values: torch.Tensor = found["input_values"][0]
        return values.float()

    def _see(self, rgb: npt.NDArray[np.uint8]) -> torch.Tensor:
        """A frame [height, width, 3] as the tower sees it, [3, height, width]."""
        processor = open_processor(self.folder, AutoVideoProcessor)
        found = processor([rgb[None]], do_sample_frames=False, return_tensors="pt")
        pixels: torch.Tensor = found["pixel_values_videos"][0, 0]
        return pixels.float()

    def _choose(self, total: int, seconds: float, options: MediaOptions) -> list[int]:
        if self.frames:
            return spread(total, self.frames)
        wanted = total if options.fps is None else max(round(seconds * options.fps), 1)
        return spread(total, min(wanted, total, MOST_FRAMES))


class _Tower(nn.Module):
    """The encoder of sound or of films, and its head."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.head(self.encoder(batch).pooler_output)
        return rows


class _Texts(nn.Module):
    """The text tower, and by the medium that texts lie beside a head and the scale of logits."""

    def __init__(
        self, tower: nn.Module, heads: dict[str, nn.Module], scales: dict[str, torch.Tensor]
    ) -> None:
        super().__init__()
        self.tower, self.heads = tower, nn.ModuleDict(heads)
        self.scales = scales

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, beside: str) -> torch.Tensor:
        found = self.tower(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, return_dict=True
        )
        # as `PeAudioModel` and `PeVideoModel` take it
        rows: torch.Tensor = self.heads[beside](found.hidden_states[-1][:, 0])
        return rows.float() * self.scales[beside]


class PeAudioVideoEncoder(HuggingFaceEncoder):
    """PE-AV; its name is that of its folder.

    Rows of media are as the heads give them; texts carry the learned scale, so that their dot
    product with media is a logit but for the learned bias, which is the same for all texts.

    Args:
        path: see `HuggingFaceEncoder`.
        how: the rest of what `Encoder` takes.

    Raises:
        CheckpointError: config.json or a processor cannot be used, or there are no weights.
        WeightsError: the processors ask for too much.
    """

    scale_of_media = True

    def __init__(self, path: Path, **how: Any) -> None:
        super().__init__(path, **how)
        vision = self.config.audio_video_config.video_config.vision_config
        said = self.settings["config.json"]["audio_video_config"]["video_config"]
        # transformers 5.18 and later forget it while they read a config within a config
        vision.num_labels = said.get("vision_config", {}).get("num_classes") or vision.num_labels
        self._reader = Reader(folder=self.folder, frames=self._frames(), rate_hz=self._rate())
        self.read = self._reader

    def _frames(self) -> int:
        """How many frames of a film the processor asks for; 0: it does not say."""
        processor = open_processor(self.folder, AutoVideoProcessor)
        frames = processor.num_frames if processor.do_sample_frames else None
        size = processor.crop_size if processor.do_center_crop else processor.size
        numbers = 3 * (frames or MOST_FRAMES) * size["height"] * size["width"]
        if not 0 < numbers <= _MOST_NUMBERS or frames == 1:
            raise WeightsError(
                f"asks for {frames} frames of {size['height']} x {size['width']}",
                where=str(self.folder),
            )
        return frames or 0

    def _rate(self) -> int:
        """Samples a second of sound."""
        extractor = open_processor(self.folder, AutoFeatureExtractor)
        rate, step = extractor.sampling_rate, extractor.hop_length
        if extractor.feature_size != 1 or not 1 <= step <= rate or rate < _LEAST_RATE_HZ:
            raise WeightsError(
                f"asks for {extractor.feature_size} channels of {rate} Hz in steps of {step}",
                where=str(self.folder),
            )
        return int(rate)

    @property
    def embedding_dim(self) -> int:
        """Width of the text tower, and of what all heads give (1024)."""
        width: int = self.config.text_config.hidden_size
        return width

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those of the model, and pictures."""
        return ("image", "video", "audio", "text")

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return open_tokenizer(self.folder)

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """ModernBERT's ids, filled up to the longest of these texts."""
        text = self.config.text_config
        return text_ids(
            self._tokenizer, texts, most=text.max_position_embeddings, words=text.vocab_size
        )

    def texts_beside(self, modality: str) -> str:
        """The model has a head for texts beside sound, and one for those beside films."""
        return _TEXT_OF_SOUND if modality == "audio" else "text"

    def heeds(self, modality: str, options: MediaOptions) -> Collection[str]:
        """The part of a recording, and how many frames where the repository does not say it."""
        fixed = modality == "video" and self._reader.frames
        return ("start", "end") if fixed else HEEDED.get(modality, ())

    def clips(self, item: Decoded) -> int:
        """The frames of a film; two seconds of sound each."""
        if item.modality == "audio":
            return math.ceil(item.tensor.shape[-1] / (_CLIP_SECONDS * self._reader.rate_hz))
        if item.modality == "video":
            return item.tensor.shape[0]
        return max(self._reader.frames, 1) if item.modality == "image" else 1

    def tower(self, modality: str) -> nn.Module:
        """That of sound, that of films and pictures, or that of texts."""
        shared = {"image": "video", _TEXT_OF_SOUND: "text"}
        return super().tower(shared.get(modality, modality))

    def load_tower(self, modality: str) -> nn.Module:
        """Reads it, and nothing of the others."""
        width = self.embedding_dim
        if modality == "text":
            tower = self._load(ModernBertModel, self.config.text_config, ("text_model.",))
            names = {side: f"{side}_model.text_{side}" for side in ("audio", "video")}
            heads = {side: self._head(f"{name}_head", width) for side, name in names.items()}
            scales = {
                side: self._tensor(f"{name}_logit_scale", (1,)).float().to(self.device)
                for side, name in names.items()
            }
            return _Texts(tower, heads, scales).requires_grad_(False).eval()
        kind = PeAudioEncoder if modality == "audio" else PeVideoEncoder
        config = getattr(self.config.audio_video_config, f"{modality}_config")
        # the tower for sound and films at once has the same one in it: a file may name it there
        places = (
            f"{modality}_model.{modality}_encoder.",
            f"audio_video_encoder.embedder.{modality}_encoder.",
        )
        encoder = self._load(kind, config, places)
        head = self._head(f"{modality}_model.{modality}_head", config.hidden_size)
        return _Tower(encoder, head).requires_grad_(False).eval()

    def _load(
        self, kind: type[PreTrainedModel], config: PreTrainedConfig, places: tuple[str, ...]
    ) -> PreTrainedModel:
        """A part of the model, found in the first of `places` that there is."""
        with open_checkpoint(self.folder) as file:
            there = [place for place in places if any(n.startswith(place) for n in file.tensors)]
        prefix = (*there, *places)[0]
        return load_part(
            kind, config, self.folder, device=self.device, dtype=self.dtype, prefix=prefix
        )

    def _head(self, name: str, width: int) -> nn.Module:
        with torch.device("meta"):
            head = PeAudioVideoContrastiveHead(width, self.embedding_dim)
        state = {
            key: self._tensor(f"{name}.{key}", tuple(value.shape)).to(self.device, self.dtype)
            for key, value in head.state_dict().items()
        }
        head.load_state_dict(state, assign=True)
        return head

    def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        with open_checkpoint(self.folder) as file:
            found = file.tensors[name].shape if name in file.tensors else None
            if found != shape:
                raise WeightsError(
                    f"{name} is {found} in the file and {shape} by the config",
                    where=str(self.folder),
                )
            value = file.read(name)
        if not (value.is_floating_point() and value.isfinite().all()):
            raise WeightsError(f"{name} holds what no weights are", where=str(self.folder))
        return value

    def run(self, modality: str, batch: torch.Tensor) -> torch.Tensor:
        """Embeddings of a batch."""
        tower = self.tower(modality)
        if modality.startswith("text"):
            beside = "audio" if modality == _TEXT_OF_SOUND else "video"
            rows: torch.Tensor = tower(batch, mask_of(batch, self._tokenizer), beside)
            return rows
        if modality == "image":
            batch = batch[:, None].expand(-1, max(self._reader.frames, 1), -1, -1, -1)
        rows = tower(batch.contiguous().to(self.dtype))
        return rows

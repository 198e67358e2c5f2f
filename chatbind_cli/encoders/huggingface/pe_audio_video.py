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

import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from torch import nn
from transformers import (
    ModernBertModel,
    PeAudioEncoder,
    PeVideoEncoder,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.pe_audio_video.modeling_pe_audio_video import PeAudioVideoContrastiveHead

from chatbind_cli.checkpoints.checkpoint import open_checkpoint
from chatbind_cli.encoders.encoder import Decoded
from chatbind_cli.encoders.huggingface.inputs import mask_of, text_ids
from chatbind_cli.encoders.huggingface.lazy_tensors import open_tensors
from chatbind_cli.encoders.huggingface.pe_media import Reader, film_shape, sound_rate
from chatbind_cli.encoders.huggingface.repository import HuggingFaceEncoder, load_part, refuse_sizes
from chatbind_cli.encoders.weights import check_shapes
from chatbind_cli.errors import WeightsError
from chatbind_cli.media.options import MediaOptions

_CLIP_SECONDS = 2
"""Of sound that counts as a clip of a batch."""

_TEXT_OF_SOUND = "text beside audio"
"""As a modality: texts as sound is compared with them."""

_MOST_OF_A_SIZE = 20_000
"""Of a number in timm's settings."""

_PLACES = {
    "text": ("text_model.", "audio_model.text_model.", "video_model.text_model."),
    "audio": ("audio_model.audio_encoder.", "audio_video_encoder.embedder.audio_encoder."),
    "video": ("video_model.video_encoder.", "audio_video_encoder.embedder.video_encoder."),
}
"""How the names of a tower's tensors begin: the model has it in several places, a file in one."""


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
    """PE-AV.

    Rows of media are as the heads give them; texts carry the learned scale, so that their dot
    product with media is a logit but for the learned bias, which is the same for all texts.

    Raises:
        CheckpointError: config.json or a processor cannot be used, or there are no weights.
        WeightsError: the processors ask for too much.
    """

    scale_of_media = True
    shared_towers: ClassVar[Mapping[str, str]] = {"image": "video", _TEXT_OF_SOUND: "text"}
    read: Reader

    def __init__(self, path: Path, **how: Any) -> None:
        super().__init__(path, **how)
        frames, *self._sides = film_shape(self.folder)
        rate = sound_rate(self.folder)
        self.read = Reader(folder=self.folder, frames=frames, rate_hz=rate)

    def config_of(self, fields: dict[str, Any]) -> Any:
        """As for all kinds; the tower for frames is one of PE's in timm."""
        _check_classes(fields, self.folder)
        config = super().config_of(fields)
        _check_vision(config.audio_video_config.video_config.vision_config, self.folder)
        return config

    @property
    def embedding_dim(self) -> int:
        """Width of the text tower, and of what all heads give (1024)."""
        width: int = self.config.text_config.hidden_size
        return width

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those of the model, and pictures."""
        return ("image", "video", "audio", "text")

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """ModernBERT's ids, filled up to the longest of these texts."""
        text = self.config.text_config
        return text_ids(
            self.tokenizer, texts, most=text.max_position_embeddings, words=text.vocab_size
        )

    def texts_beside(self, modality: str) -> str:
        """The model has a head for texts beside sound, and one for those beside films."""
        return _TEXT_OF_SOUND if modality == "audio" else "text"

    def heeds(self, modality: str, options: MediaOptions) -> Collection[str]:
        """As all kinds, but for the frames where the repository says how many."""
        heeded = super().heeds(modality, options)
        return [name for name in heeded if name != "fps" or not self.read.frames]

    def clips(self, item: Decoded) -> int:
        """The frames of a film; two seconds of sound each."""
        if item.modality == "audio":
            return math.ceil(item.tensor.shape[-1] / (_CLIP_SECONDS * self.read.rate_hz))
        if item.modality == "video":
            return item.tensor.shape[0]
        return max(self.read.frames, 1) if item.modality == "image" else 1

    def load_tower(self, modality: str) -> nn.Module:
        """Reads it, and nothing of the others."""
        width = self.embedding_dim
        if modality == "text":
            tower = self._load(ModernBertModel, self.config.text_config, _PLACES["text"])
            names = {side: f"{side}_model.text_{side}" for side in ("audio", "video")}
            heads = {side: self._head(f"{name}_head", width) for side, name in names.items()}
            scales = {
                side: self._tensor(f"{name}_logit_scale", (1,)).float().to(self.device)
                for side, name in names.items()
            }
            return _Texts(tower, heads, scales).requires_grad_(False).eval()
        kind = PeAudioEncoder if modality == "audio" else PeVideoEncoder
        config = getattr(self.config.audio_video_config, f"{modality}_config")
        encoder = self._load(kind, config, _PLACES[modality])
        if modality == "video":
            patches = encoder.get_submodule("embedder.vision_model.timm_model.patch_embed")
            takes = list(vars(patches)["img_size"])
            if takes != self._sides:
                raise WeightsError(
                    f"has frames of {self._sides} in its processor, and of {takes} in its tower",
                    where=str(self.folder),
                )
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
            found = {name: file.tensors[name].shape} if name in file.tensors else {}
            check_shapes(found, {name: shape}, str(self.folder), "PE-AV")
            return open_tensors(file)[name][...]

    def run(self, modality: str, batch: torch.Tensor) -> torch.Tensor:
        """Embeddings of a batch."""
        tower = self.tower(modality)
        if modality.startswith("text"):
            beside = "audio" if modality == _TEXT_OF_SOUND else "video"
            rows: torch.Tensor = tower(batch, mask_of(batch, self.tokenizer), beside)
            return rows
        if modality == "image":
            batch = batch[:, None].expand(-1, max(self.read.frames, 1), -1, -1, -1)
        rows = tower(batch.contiguous().to(self.dtype))
        return rows


def _check_classes(fields: Mapping[str, Any], folder: Path) -> None:
    """Refuses numbers of classes in a config.json, each of which would get a name as it is read.

    Raises:
        WeightsError: there are too many.
    """
    part: Any = fields
    for name in ("audio_video_config", "video_config", "vision_config"):
        part = part.get(name) if isinstance(part, dict) else None
    classes = part.get("num_classes", 1) if isinstance(part, dict) else 1
    if type(classes) is not int or not 1 <= classes <= _MOST_OF_A_SIZE:
        raise WeightsError(f"asks for num_classes = {classes!r:.40}", where=str(folder))


def _check_vision(vision: PreTrainedConfig, folder: Path) -> None:
    """Refuses towers for frames that timm would fetch, read from elsewhere, or fill memory with.

    Also puts right what transformers 5.18 and later forget as they read a config within a config.

    Raises:
        WeightsError: it is one.
    """
    said = getattr(vision, "model_args", None) or {}
    own = {name for name in inspect.signature(timm.create_model).parameters if name != "kwargs"}
    known = getattr(vision, "architecture", "") in timm.list_models("vit_pe_*")
    known = known and isinstance(said, dict)
    if not known or own & said.keys():
        raise WeightsError("has a tower for frames that is not PE's", where=str(folder))
    refuse_sizes(said, folder, most=_MOST_OF_A_SIZE)
    vision.num_labels = int(getattr(vision, "num_classes", None) or vision.num_labels or 0)

"""EmbeddingGemma 2 (Google) as an encoder: pictures, films, sound, texts.

An embedding is the mean over all places of the language model's output, of length 1: the text's, or
those of a medium's soft tokens between the tokens that begin and end it, as the model's processor
puts them for a medium alone. Media have no prompt; texts have the repository's for classification
("task: classification | query: "), as in the model's zero-shot tasks. There is no learned scale: a
zero-shot probability is a softmax of cosines, which lie close together.

What is looked at follows the repository's own processors. Pictures keep their shape, within a
budget of soft tokens; they are not filled up to it. Films: `fps` frames a second, one, and of
more than `max_frames`, 32, so many spread evenly. Sound: the first 480,000 samples, 30 seconds.

Repositories without a vision or an audio part are known, too. Sources: transformers' classes
`EmbeddingGemma2*` and `Gemma4*`; the files of google/embeddinggemma-2 (processor_config.json,
1_Pooling, 2_Normalize, config_sentence_transformers.json); mteb's recipe for the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.nn import functional
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.encoders.encoder import Decoded
from chatbind_cli.encoders.huggingface.gemma_media import Reader, check_pictures, sound_rate
from chatbind_cli.encoders.huggingface.inputs import mask_of, text_ids
from chatbind_cli.encoders.huggingface.repository import HuggingFaceEncoder, load_part
from chatbind_cli.errors import WeightsError

_MOST_IDS = 8192
"""Of a text, with which the model was trained."""

_MOST_ID = 1 << 30

_PROMPTS = "config_sentence_transformers.json"
_PARTS = {"image": "vision", "audio": "audio"}


class EmbeddingGemma2Encoder(HuggingFaceEncoder):
    """EmbeddingGemma 2. Rows have norm 1.

    Raises:
        CheckpointError: config.json or a processor cannot be used, or there are no weights.
        WeightsError: the processors ask for too much, or are not this model's.
    """

    shared_towers: ClassVar[Mapping[str, str]] = {"video": "image"}

    def __init__(self, path: Path, **how: Any) -> None:
        super().__init__(path, **how)
        self._model: nn.Module | None = None
        self._check_ids()
        vision, sounds = self.config.vision_config, self.config.audio_config
        if vision:
            check_pictures(self.folder, vision)
        rate = sound_rate(self.folder, sounds, self.settings) if sounds else 0
        self.read = Reader(folder=self.folder, rate_hz=rate)

    def _check_ids(self) -> None:
        """Refuses ids of media in a prompt that are none."""
        config, ends, soft = self.config, [], []
        if config.vision_config:
            ends += [config.boi_token_id, config.eoi_token_id]
            soft += [config.image_token_id, config.video_token_id]
        if config.audio_config:
            ends += [config.boa_token_id, config.eoa_token_index]
            soft += [config.audio_token_id]
        # the model takes soft ones out before it looks any up
        known = range(config.text_config.vocab_size)
        fine = all(type(token) is int and 0 <= token < _MOST_ID for token in soft)
        fine = fine and all(type(token) is int and token in known for token in ends)
        if not fine or len({*ends, *soft}) < len(ends + soft):
            raise WeightsError("has ids for media that are none", where=str(self.folder))

    @property
    def embedding_dim(self) -> int:
        """Length of an embedding (768)."""
        dim: int = self.config.text_config.embedding_dim
        return dim

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those of the parts that there are."""
        seen = ("image", "video") if self.config.vision_config else ()
        return (*seen, *(("audio",) if self.config.audio_config else ()), "text")

    @property
    def settings(self) -> dict[str, Any]:
        """Those of all repositories, and the prompt of texts."""
        return {**super().settings, _PROMPTS: {"Classification": self.prompt}}

    @cached_property
    def prompt(self) -> str:
        """What stands before each text; empty where the repository says none."""
        said = read_json(self.folder / _PROMPTS, missing_ok=True).get("prompts")
        found = said.get("Classification") if isinstance(said, dict) else None
        return found[:1000] if isinstance(found, str) else ""

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """The ids of texts behind the prompt, filled up to the longest of these texts."""
        return self._ids([self.prompt + text for text in texts])

    def _ids(self, texts: Sequence[str]) -> torch.Tensor:
        sizes = self.config.text_config
        most = min(sizes.max_position_embeddings, _MOST_IDS)
        return text_ids(self.tokenizer, texts, most=most, words=sizes.vocab_size)

    def clips(self, item: Decoded) -> int:
        """The frames of a film."""
        return item.tensor.shape[0] if item.modality == "video" else 1

    def load_tower(self, modality: str) -> nn.Module:
        """The language model with the towers asked for so far; the others are not read."""
        if self._model is None:
            self._model = self._load()
        part = _PARTS.get(modality)
        if part and getattr(self._model, f"{part}_tower") is None:
            made = self._load(part)
            for name in (f"{part}_tower", f"embed_{part}"):
                setattr(self._model, name, made.get_submodule(name))
        return self._model

    def _load(self, part: str | None = None) -> nn.Module:
        """The language model alone, or the tower of a part without it."""
        config: PreTrainedConfig = deepcopy(self.config)
        for other in {"vision", "audio"} - {part}:
            setattr(config, f"{other}_config", None)
        model = load_part(
            cast(type[PreTrainedModel], MODEL_MAPPING[type(config)]),
            config,
            self.folder,
            device=self.device,
            dtype=self.dtype,
            without=("language_model",) if part else (),
        )
        model.config = self.config
        return model

    def run(self, modality: str, batch: torch.Tensor) -> torch.Tensor:
        """Embeddings of a batch."""
        model = self.tower(modality)
        if modality == "text":
            mask = mask_of(batch, self.tokenizer)
            found = model(input_ids=batch, attention_mask=mask, return_dict=True)
        else:
            inputs = self._inputs(modality, batch)
            mask = torch.ones_like(inputs["input_ids"])
            found = model(**inputs, attention_mask=mask, return_dict=True)
        places = found.last_hidden_state.float()
        pooled = (places * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return functional.normalize(pooled, dim=-1)

    def _inputs(self, modality: str, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model takes of a batch of media, each as if it stood alone in a prompt."""
        config, values = self.config, batch.to(self.dtype)
        if modality == "audio":
            soft = math.ceil(math.ceil(batch.shape[1] / 2) / 2)  # two convolutions of stride 2
            row = [config.boa_token_id, *[config.audio_token_id] * soft, config.eoa_token_index]
            heard = torch.ones(batch.shape[:2], dtype=torch.bool, device=self.device)
            inputs = {"input_features": values, "input_features_mask": heard}
        else:
            film = modality == "video"
            rows, columns, numbers = batch.shape[-3:]
            soft = rows * columns // config.vision_config.pooling_kernel_size**2
            token = config.video_token_id if film else config.image_token_id
            row = [config.boi_token_id, *[token] * soft, config.eoi_token_id]
            pixels = values.reshape(-1, rows * columns, numbers)
            at = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
            places = at.to(self.device).expand(len(pixels), -1, -1)
            inputs = {"pixel_values": pixels, "image_position_ids": places}
            if film:
                row *= batch.shape[1]
                frames = torch.full((len(batch),), batch.shape[1], device=self.device)
                inputs = {"pixel_values_videos": pixels, "video_position_ids": places}
                inputs["num_frames_per_video"] = frames
        ids = torch.tensor(self._framed(row), device=self.device)
        return {**inputs, "input_ids": ids.expand(len(batch), -1)}

    def _framed(self, row: list[int]) -> list[int]:
        """Ids with what the tokenizer puts before and after any text."""
        first = row[0]
        around = self._ids([str(self.tokenizer.convert_ids_to_tokens(first))])[0].tolist()
        if around.count(first) != 1:
            raise WeightsError("has a tokenizer that is not this model's", where=str(self.folder))
        at = around.index(first)
        return [*around[:at], *row, *around[at + 1 :]]

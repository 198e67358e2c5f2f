"""Encoders of pictures in transformers: CLIP's kin, which know texts too, and plain ones.

A picture's embedding is what the model itself makes of it: of CLIP's kin the output of
`get_image_features`; of others the pooled output, or the class token where the model pools nothing
or its pooler is not in the weights (as in those of classifiers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING

from chatbind_cli.checkpoints.checkpoint import Checkpoint, open_checkpoint
from chatbind_cli.encoders.huggingface.repository import (
    HuggingFaceEncoder,
    load_part,
    open_processor,
)
from chatbind_cli.encoders.pixels import narrow_box
from chatbind_cli.errors import WeightsError
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.pictures import open_rgb
from chatbind_cli.media.source import MediaSource
from chatbind_cli.model.pretrained import model_without_memory, one_line

KINDS = (
    "an encoder is ImageBind, LanguageBind, PE-AV, EmbeddingGemma 2, an image encoder of "
    "transformers (CLIP, SigLIP, DINOv2, ViT, ...), or one of timm"
)

_WORK = 24
"""Bytes a pixel that processors take beside the picture."""

_PADDED = ("siglip", "siglip2", "aimv2")
"""They saw texts filled up to one length: SigLIP looks at the last place, AIMv2 (in transformers)
forgets its causal mask where there is nothing to mask."""

_RANDOM = ("vit_mae",)
"""They drop patches at random whenever they run."""

_MOST_ROWS = 64
"""Of patches of a LeVit, which lists all pairs of them as it is made; published ones have 14."""


@dataclass(frozen=True)
class Reader:
    """Reads pictures as the processor of a repository does; may be sent to other processes."""

    folder: Path

    def __call__(self, source: MediaSource, modality: str, options: MediaOptions) -> torch.Tensor:
        """Reads one picture.

        Returns:
            float32, mostly [3, rows, columns]. Where patches come in a row of changing form
            (SigLIP 2), [2 + patches, numbers]: the first row begins with the rows and columns, the
            last is empty.

        Raises:
            MediaError: it cannot be read.
            CheckpointError: the processor is none.
        """
        processor = open_processor(self.folder)
        with open_rgb(source, options.max_pixels, work=_WORK) as picture:
            return _processed(processor, picture)


class ImageTowers(HuggingFaceEncoder):
    """A model of transformers that knows pictures, and texts if it is of CLIP's kin.

    Raises:
        WeightsError: the model knows no pictures, or makes no one vector of one.
        CheckpointError: see `HuggingFaceEncoder`; or there is no processor.
    """

    def __init__(self, path: Path, **how: Any) -> None:
        super().__init__(path, **how)
        self.read = Reader(self.folder)
        self._kind = _class_of(self.config, self.folder)
        self._two = hasattr(self._kind, "get_text_features")
        with one_line("cannot be opened", self.folder), open_checkpoint(self.folder) as file:
            _refuse_pairs(self.config)
            blank: Any = model_without_memory(self.config, file, self._kind)
            names = [name for name, _ in blank.named_parameters()]
            self._without = {
                "image": tuple(n for n, _ in blank.named_children() if n.startswith("text")),
                "text": tuple(n for n, _ in blank.named_children() if n.startswith("vis")),
            }
            pooled = any(name.startswith("pooler.") for name in names)
            if pooled and not any("pooler." in name for name in file.tensors):
                self._without["image"] = ("pooler",)
                blank.pooler = None
            self._has_class = any(n.endswith(("cls_token", "class_embedding")) for n in names)
            self._scale = _logit_scale(file, self.config) if self._two else None
        self._dim = self._width_of(blank)

    @property
    def embedding_dim(self) -> int:
        """What the model makes of a picture has this length."""
        return self._dim

    @property
    def modalities(self) -> tuple[str, ...]:
        """Pictures, and texts where logits have a scale: those of BLIP-2 are for generation."""
        return ("image",) if self._scale is None else ("image", "text")

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """Ids and, if the model wants it, the mask of padding: int64 [n, 1 or 2, places]."""
        tokenizer = self.tokenizer
        sizes = self.config.get_text_config()
        places = min(getattr(sizes, "max_position_embeddings", 512), tokenizer.model_max_length)
        masked = "attention_mask" in tokenizer.model_input_names
        fixed = self.config.model_type in _PADDED or not masked
        with one_line("its tokenizer breaks over a text", self.folder):
            made = tokenizer(
                list(texts),
                padding="max_length" if fixed else "longest",
                truncation=True,
                max_length=places,
                return_tensors="pt",
            )
        parts = ["input_ids", *(["attention_mask"] if masked else [])]
        ids = torch.stack([made[part] for part in parts], dim=1)
        if int(ids[:, 0].max()) >= sizes.vocab_size:
            raise WeightsError("its tokenizer has more tokens than it", where=str(self.folder))
        return ids

    def compare(self, embedding: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """The model's own logits of texts, but for a bias that all have: [texts]."""
        if self._scale is None:
            raise self.lacks("text")
        return self._scale * F.normalize(texts, dim=-1) @ F.normalize(embedding, dim=-1)

    def load_tower(self, modality: str) -> nn.Module:
        """The model without the other tower."""
        return load_part(
            self._kind,
            self.config,
            self.folder,
            device=self.device,
            dtype=self.dtype,
            without=self._without[modality],
        )

    def run(self, modality: str, batch: torch.Tensor) -> torch.Tensor:
        """Embeddings of a batch, of whatever norm the model gives."""
        model: Any = self.tower(modality)
        if modality == "text":
            ids, *mask = batch.unbind(dim=1)
            made = model.get_text_features(ids, **({"attention_mask": mask[0]} if mask else {}))
            return _vectors(made, has_class=False)
        return self._see(model, _inputs(batch, self.dtype))

    def _see(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        made = model.get_image_features(**inputs) if self._two else model(**inputs)
        return _vectors(made, has_class=self._has_class)

    def _width_of(self, blank: Any) -> int:
        """The length of an embedding, by a run of the model without weights."""
        wrong = "gives no one vector of a picture"
        with one_line(wrong, self.folder), torch.inference_mode():
            pixels = _processed(open_processor(self.folder), Image.new("RGB", (64, 64)))[None]
            inputs: dict[str, Any] = _inputs(pixels, self.dtype)
            inputs["pixel_values"] = inputs["pixel_values"].to("meta")
            if "pixel_attention_mask" in inputs:  # its numbers would be looked at
                inputs["pixel_attention_mask"] = None
            made = self._see(blank.to(self.dtype).eval(), inputs)
        if made.ndim != 2 or len(made) != 1:
            raise WeightsError(f"{wrong} ({list(made.shape)})", where=str(self.folder), hint=KINDS)
        return made.shape[1]


def _class_of(config: Any, folder: Path) -> type[PreTrainedModel]:
    """The class of a config's model.

    Raises:
        WeightsError: it is no encoder of pictures.
    """
    found: Any = MODEL_MAPPING.get(type(config), None)
    kind = found[0] if isinstance(found, (tuple, list)) else found
    two = hasattr(kind, "get_image_features") and hasattr(kind, "get_text_features")
    film = type(config) in MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING
    one = getattr(kind, "main_input_name", "") == "pixel_values" and not film
    if config.model_type in _RANDOM:
        raise WeightsError(
            f"a {config.model_type} model looks at patches drawn at random", where=str(folder)
        )
    if kind is None or not (two or one):
        raise WeightsError(
            f"a {config.model_type} model is no encoder of pictures",
            where=str(folder),
            hint=KINDS,
        )
    made: type[PreTrainedModel] = kind
    return made


def _refuse_pairs(config: Any) -> None:
    """Refuses a LeVit whose pairs of patches would fill memory.

    Raises:
        WeightsError: it is one.
    """
    sides = (config.image_size, config.patch_size) if config.model_type == "levit" else (0, 1)
    if sides[0] // sides[1] > _MOST_ROWS:
        raise WeightsError(f"asks for {sides[0]} pixels in patches of {sides[1]}")


def _logit_scale(file: Checkpoint, config: Any) -> float | None:
    """The scale of a softmax over texts; None where the weights have none.

    Raises:
        WeightsError: it is no number.
    """
    for name in file.tensors:
        part = name.rpartition(".")[2]
        if part in ("logit_scale", "temperature") and file.info(name).numel == 1:
            value = float(file.read(name).float().reshape(()))
            most = math.log(getattr(config, "max_logit_scale", math.inf))
            try:
                scale = math.exp(min(value, most)) if part == "logit_scale" else 1 / value
            except (OverflowError, ZeroDivisionError):
                scale = math.inf
            if not math.isfinite(scale):
                raise WeightsError(f"{name} is {value:.6g}", where=str(file.path))
            return scale
    return None


def _processed(processor: Any, picture: Image.Image) -> torch.Tensor:
    """What a processor makes of one picture, as one tensor."""
    size = getattr(processor, "size", None)
    if size and "shortest_edge" in size:  # its long side would grow with its short one
        picture = picture.crop(narrow_box(*picture.size))
    made = processor(images=picture, return_tensors="pt")
    pixels: torch.Tensor = made["pixel_values"][0].float()
    if "spatial_shapes" not in made:
        return pixels
    head = F.pad(made["spatial_shapes"][0].float(), (0, pixels.shape[-1] - 2))
    # one empty patch more: without any, attention would go another way, and round otherwise
    return torch.cat([head[None], pixels, torch.zeros_like(pixels[:1])])


def _inputs(batch: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a model takes of a batch of `_processed`."""
    if batch.ndim != 3:
        return {"pixel_values": batch.to(dtype)}
    shapes = batch[:, 0, :2].long()
    places = torch.arange(batch.shape[1] - 1, device=batch.device)
    mask = places < shapes.prod(dim=1, keepdim=True)
    return {
        "pixel_values": batch[:, 1:].to(dtype),
        "pixel_attention_mask": mask.int(),
        "spatial_shapes": shapes,
    }


def _vectors(made: Any, *, has_class: bool) -> torch.Tensor:
    """The one vector that a model gives of each picture or text, [n, dim]."""
    pooled = made if isinstance(made, torch.Tensor) else getattr(made, "pooler_output", None)
    if pooled is None:
        states: torch.Tensor = made.last_hidden_state
        return states[:, 0] if has_class else states
    # a map of one place
    return pooled.flatten(1) if pooled.ndim == 4 and pooled.shape[2:] == (1, 1) else pooled

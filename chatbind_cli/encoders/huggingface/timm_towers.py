"""Encoders of pictures in timm, by a name that timm knows (`timm:NAME`) or in a folder.

An embedding is what the model pools before its classifier, which is left out. The evaluation
transform of timm reads pictures.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from timm.models import PretrainedCfg, is_model_pretrained
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from chatbind_cli.checkpoints.checkpoint import open_checkpoint
from chatbind_cli.encoders.huggingface.lazy_tensors import open_tensors
from chatbind_cli.encoders.huggingface.repository import HuggingFaceEncoder, refuse_sizes
from chatbind_cli.encoders.pixels import narrow_box
from chatbind_cli.errors import UsageError, WeightsError
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.pictures import open_rgb
from chatbind_cli.media.source import MediaSource
from chatbind_cli.model.pretrained import model_without_memory, one_line

_SCHEME = "timm:"
_WORK = 24
"""Bytes a pixel that transforms take beside the picture."""

_LEADING_ELSEWHERE = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")
_SAID_OF_WEIGHTS = {field.name for field in fields(PretrainedCfg)} - {*_LEADING_ELSEWHERE}
_NOT_OF_A_MODEL = (
    "checkpoint_path",
    "cache_dir",
    "features_only",
    "device",
    "dtype",
    "num_classes",
)
_MOST_OF_A_SIZE = 65_536


class _Mapped(torch.Tensor):
    """A part of a mapped file for timm, which copies its settings and the weights among them.

    PyTorch would copy all of the file with each part.
    """

    def __deepcopy__(self, memo: Any) -> _Mapped:
        return self


@dataclass(frozen=True)
class TimmConfig:
    """What timm makes a model of.

    Attributes:
        architecture: a name that timm knows, with its tag if it is timm's own.
        pretrained: how its weights saw pictures, and whose they are; {}: timm knows by the tag.
        arguments: sizes that differ from the architecture's.
    """

    architecture: str
    pretrained: dict[str, Any]
    arguments: dict[str, Any]

    def make(self, **how: Any) -> nn.Module:
        """The model without its classifier, with random weights unless `how` says others."""
        if self.pretrained:
            how["pretrained_cfg"] = self.pretrained
        with _quiet():
            model = timm.create_model(self.architecture, num_classes=0, **self.arguments, **how)
        return model.eval()


@dataclass(frozen=True)
class Reader:
    """Reads pictures by timm's evaluation transform; may be sent to other processes.

    Attributes:
        data: the settings of the transform, as JSON.
    """

    data: str

    def __call__(self, source: MediaSource, modality: str, options: MediaOptions) -> torch.Tensor:
        """Reads one picture: float32 [3, rows, columns].

        Raises:
            MediaError: it cannot be read.
        """
        with open_rgb(source, options.max_pixels, work=_WORK) as picture:
            # the ends of a very long one, which the crop drops, would fill the memory
            long = '"crop_mode": "center"' in self.data
            part = picture.crop(narrow_box(*picture.size)) if long else picture
            pixels: torch.Tensor = _transform(self.data)(part)
            return pixels


class TimmTowers(HuggingFaceEncoder):
    """A model of timm, which knows pictures.

    Raises:
        WeightsError: config.json means no model of timm, or one that does not fit the weights.
        CheckpointError: see `HuggingFaceEncoder`.
    """

    config: TimmConfig
    read: Reader

    def __init__(self, path: Path, **how: Any) -> None:
        super().__init__(path, **how)
        if self.reference.startswith(_SCHEME):
            self.name = self.config.architecture
        with one_line("is no model of timm that can be used", self.folder):
            with open_checkpoint(self.folder) as file:
                make: Any = TimmConfig.make
                blank: Any = model_without_memory(cast(Any, self.config), file, make)
            data = resolve_model_data_config(blank)
            refuse_sizes(data, self.folder)
            self.read = Reader(json.dumps(data, sort_keys=True))
            with torch.inference_mode():
                made = blank(torch.empty(1, *data["input_size"], device="meta"))
            if made.ndim != 2:
                raise WeightsError(f"gives no one vector of a picture ({list(made.shape)})")
        self._dim = int(made.shape[1])
        self.licence = blank.pretrained_cfg.get("license") or self.licence

    def config_of(self, fields: dict[str, Any]) -> TimmConfig:
        """What config.json says, without what leads elsewhere; timm itself says it of a name.

        Raises:
            WeightsError: timm does not know the architecture, or a size is none.
        """
        if self.reference.startswith(_SCHEME):
            return TimmConfig(self.reference.removeprefix(_SCHEME), {}, {})
        where, name = str(self.folder), fields.get("architecture")
        if not isinstance(name, str) or ":" in name or not timm.is_model(name):
            raise WeightsError(f"timm knows no architecture {name!r:.80}", where=where)
        said, sizes = (fields.get(key) or {} for key in ("pretrained_cfg", "model_args"))
        if not (isinstance(said, dict) and isinstance(sizes, dict)):
            raise WeightsError("pretrained_cfg or model_args is no JSON object", where=where)
        pretrained = {key: value for key, value in said.items() if key in _SAID_OF_WEIGHTS}
        arguments = {
            key: value
            for key, value in sizes.items()
            if key not in _NOT_OF_A_MODEL and "pretrained" not in key
        }
        refuse_sizes(arguments, self.folder, most=_MOST_OF_A_SIZE)
        return TimmConfig(name, {**pretrained, "custom_load": False}, arguments)

    @property
    def settings(self) -> dict[str, Any]:
        """What config.json says, and the transform."""
        return {**super().settings, "transform": json.loads(self.read.data)}

    @property
    def embedding_dim(self) -> int:
        """The features before the classifier."""
        return self._dim

    @property
    def modalities(self) -> tuple[str, ...]:
        """Pictures."""
        return ("image",)

    def load_tower(self, modality: str) -> nn.Module:
        """The model with its weights, as timm takes them over."""
        with one_line("cannot be opened", self.folder), _what_misses() as missing:
            with open_checkpoint(self.folder) as file:
                tensors = open_tensors(file).items()
                state = {name: one[...].as_subclass(_Mapped) for name, one in tensors}
            overlay = {"state_dict": state}
            model: Any = self.config.make(pretrained=True, pretrained_cfg_overlay=overlay)
        if missing:
            raise WeightsError(
                f"{len(missing)} tensors are missing, the first is {min(missing)}",
                where=str(self.folder),
            )
        model.pretrained_cfg.pop("state_dict", None)
        made: nn.Module = model.to(self.device, self.dtype).requires_grad_(False)
        return made

    def run(self, modality: str, batch: torch.Tensor) -> torch.Tensor:
        """Embeddings of a batch, of whatever norm the model gives."""
        made: torch.Tensor = self.tower(modality)(batch.to(self.dtype))
        return made


def find_model(name: str) -> tuple[str, str]:
    """What timm knows by a name: the name with its tag, and the hub repository of its weights.

    Raises:
        UsageError: timm does not know it, or knows no weights of it on the hub.
    """
    known = timm.is_model(name) and ":" not in name
    found = timm.get_pretrained_cfg(name) if known and is_model_pretrained(name) else None
    if found is None or not found.hf_hub_id:
        stem = name.partition(".")[0]
        near = timm.list_models(f"{stem}.*", pretrained=True) if known else []
        near = near or get_close_matches(stem, timm.list_models(), 3, 0.5)
        raise UsageError(
            f"timm has no {name!r:.80} with weights on the Hugging Face hub",
            hint=f"for instance {', '.join(near[:3])}" if near else None,
        )
    return f"{found.architecture}.{found.tag}" if found.tag else name, found.hf_hub_id


@contextmanager
def _what_misses() -> Iterator[set[str]]:
    """The names of tensors that a model lacks when it is made and loaded inside: timm tells none.

    Its modules are asked, from their making on, since timm does both in one call.
    """
    missing: set[str] = set()
    handles: list[Any] = []

    def note(module: nn.Module, keys: Any) -> None:
        missing.update(keys.missing_keys)

    def watch(module: nn.Module, name: str, child: nn.Module | None) -> None:
        handles.append(module.register_load_state_dict_post_hook(note))

    handles.append(register_module_module_registration_hook(watch))
    try:
        yield missing
    finally:
        for handle in handles:
            handle.remove()


@cache
def _transform(data: str) -> Any:
    """A transform, once a process."""
    return create_transform(**json.loads(data), is_training=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Lets timm say nothing of what it leaves out or takes over."""
    log = logging.getLogger("timm")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)

"""What all encoders share that lie in a repository of the Hugging Face hub's layout.

A folder with config.json, weights, and the settings of its processor and tokenizer, for a class
that transformers has. None of its code runs, transformers sees but what was checked, and of the
weights only the tensors of the towers that are asked for are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from chatbind_cli.checkpoints.checkpoint import folder_of, open_checkpoint
from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.encoders.encoder import Encoder
from chatbind_cli.encoders.huggingface.lazy_tensors import open_tensors
from chatbind_cli.errors import WeightsError
from chatbind_cli.files import sha256_file, sha256_text
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.model.pretrained import (
    make_config,
    model_without_memory,
    one_line,
    open_tokenizer,
    quiet_transformers,
)
from chatbind_cli.model.staging import MOST_CONFIG, cleaned
from chatbind_cli.worker import temporary_folder

_CONFIG = "config.json"
_PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_TOKENIZER = re.compile(r"(tokenizer|vocab|merges|special_tokens|added_tokens|spiece|.*\.bpe)")
_NO_SETTINGS = ("architectures", "transformers_version", "dtype", "torch_dtype")

_HEEDED = {"video": ("fps", "start", "end"), "audio": ("start", "end")}

_MOST = 2048
"""Of a number in a processor's settings: pixels of a side, parts, ..."""
_MORE = {"sampling_rate": 200_000, "max_frequency": 100_000, "max_num_patches": 16_384}
_IDS = ("_id", "_index", "_token")
_LEAST_CROP = 0.5  # the side that is left, of the side that a picture is resized to

_README_BYTES = 64 << 10
_LICENCE = re.compile(r"^licen[sc]e:[ \t]*[\"']?([\w.+ -]{1,60}?)[\"']?[ \t]*$", re.MULTILINE)


class HuggingFaceEncoder(Encoder):
    """An encoder in a repository's folder; its name is that of the folder.

    Args:
        path: the folder, or its weights file.
        how: the rest of what `Encoder` takes.

    Attributes:
        folder: where it lies.
        config: what config.json says.

    Raises:
        CheckpointError: config.json cannot be used, or there are no weights.
        WeightsError: a weights file is broken, or is quantised.
    """

    def __init__(self, path: Path, **how: Any) -> None:
        self.folder = folder_of(path).absolute()
        super().__init__(name=self.folder.resolve().name, **how)
        self.config = self.config_of(read_json(self.folder / _CONFIG, most_bytes=MOST_CONFIG))
        self.licence = licence_of(self.folder)
        self._weights = [file.path for file in open_checkpoint(self.folder).files]

    def config_of(self, fields: dict[str, Any]) -> Any:
        """The settings of the model that config.json's `fields` mean.

        Raises:
            CheckpointError: none, or of what no model has.
            WeightsError: the weights are quantised.
        """
        if "quantization_config" in fields:
            raise WeightsError("its weights are quantised", where=str(self.folder))
        return make_config(fields, self.folder)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of model and processors, as their files say them."""
        found = {name: _checked(self.folder, name) for name in (_CONFIG, *_PROCESSORS)}
        config = found[_CONFIG]
        return {
            **{name: fields for name, fields in found.items() if fields},
            _CONFIG: {key: value for key, value in config.items() if key not in _NO_SETTINGS},
        }

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over those of the weights, the settings, and the tokenizer's files."""
        beside = sorted(
            part
            for part in self.folder.iterdir()
            if _TOKENIZER.match(part.name) and part.is_file() and part not in self._weights
        )
        hashes = [sha256_file(path) for path in (*self._weights, *beside)]
        return sha256_text(json.dumps([hashes, self.settings], sort_keys=True))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The repository's.

        Raises:
            CheckpointError: there is none, or it cannot be used.
        """
        return open_tokenizer(self.folder)

    def heeds(self, modality: str, options: MediaOptions) -> Collection[str]:
        """The part of a recording, and the frames of a film."""
        return _HEEDED.get(modality, ()) if modality in self.modalities else ()


def licence_of(folder: Path) -> str | None:
    """The licence that the head of a repository's README.md names."""
    readme = folder / "README.md"
    if not readme.is_file():  # a pipe would never end
        return None
    try:
        with readme.open("rb") as file:
            text = file.read(_README_BYTES).decode("utf-8", errors="replace").replace("\r\n", "\n")
    except OSError:
        return None
    if not text.startswith("---\n"):
        return None
    found = _LICENCE.search(text[4:].partition("\n---")[0])
    return found[1] if found else None


def load_part(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    without: Collection[str] = (),
    prefix: str = "",
) -> PreTrainedModel:
    """A model of transformers but for some of its modules, frozen; nothing of those is read.

    Args:
        kind: its class.
        config: its settings: the folder's, or a part of those.
        folder: where the weights lie.
        device: where it is to work.
        dtype: what its numbers become.
        without: modules of the model itself that it is not to have (`text_model`).
        prefix: what its tensors' names begin with in the files, and not in the class.

    Raises:
        WeightsError: a tensor is missing, of another shape, not finite, or cannot be read; the
            first such is named.
        CheckpointError: the config makes no model, or a larger one than the weights are.
    """
    part = _class_without(kind, without)
    with one_line("cannot be opened", folder), open_checkpoint(folder) as checkpoint:
        model_without_memory(config, checkpoint, part)
        tensors = open_tensors(checkpoint)
        state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        with quiet_transformers():
            opened: Any = part
            model, report = opened.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=dtype,
                ignore_mismatched_sizes=True,  # they are told below
                output_loading_info=True,
                trust_remote_code=False,
                local_files_only=True,
            )
    _refuse_misfits(report, folder)
    made: PreTrainedModel = model.to(device).requires_grad_(False).eval()
    return made


def _refuse_misfits(report: Mapping[str, Any], folder: Path) -> None:
    missing = sorted(report["missing_keys"])
    if missing:
        raise WeightsError(
            f"{len(missing)} tensors are missing, the first is {missing[0]}", where=str(folder)
        )
    for name, found, wanted in sorted(report["mismatched_keys"], key=str):
        raise WeightsError(
            f"{name} is {list(found)} in the file and {list(wanted)} by the config",
            where=str(folder),
        )


def _class_without(kind: type[PreTrainedModel], without: Collection[str]) -> type[PreTrainedModel]:
    """The same class, whose models lack some modules."""
    if not without:
        return kind

    def make(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **how: Any) -> None:
        kind.__init__(self, config, *args, **how)
        for name in without:
            setattr(self, name, None)

    def initialise(self: PreTrainedModel, module: nn.Module) -> None:
        # what lies in no file; the model itself has nothing there, and would look for its parts
        if module is not self:
            kind._init_weights(self, module)

    body = {"__init__": make, "_init_weights": initialise, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), body)


@cache
def open_processor(folder: Path, kind: type[Any] = AutoImageProcessor) -> Any:
    """The processor of a repository, of the class `kind`; once a process.

    A reader holds the folder alone, and gets its processor here, so that it can be sent to other
    processes.

    Args:
        folder: the repository.
        kind: `AutoImageProcessor`, `AutoVideoProcessor`, ...: any that needs no tokenizer.

    Raises:
        CheckpointError: there is none, or its settings would fill memory.
    """
    with (
        one_line("no usable processor", folder),
        temporary_folder() as stage,
        quiet_transformers(),
    ):
        # of what was checked, and without the tokenizer, which may take seconds to read
        for name in (_CONFIG, *_PROCESSORS):
            if fields := _checked(folder, name):
                (Path(stage) / name).write_text(json.dumps(fields), encoding="utf-8")
        return kind.from_pretrained(stage, trust_remote_code=False, local_files_only=True)


def _checked(folder: Path, name: str) -> dict[str, Any]:
    """The settings in a file without what leads elsewhere; {} where it is not there.

    Raises:
        CheckpointError: it cannot be read.
        WeightsError: a processor's would make more of a medium than fits in memory.
    """
    fields: dict[str, Any] = cleaned(
        read_json(folder / name, missing_ok=True, most_bytes=MOST_CONFIG)
    )
    if name != _CONFIG:
        refuse_sizes(fields, folder / name)
    return fields


def refuse_sizes(value: Any, where: Path, key: str = "", most: int = _MOST) -> None:
    """Refuses settings that would make more of a medium, or a larger model, than fits in memory.

    Args:
        value: the settings, as JSON.
        where: for the error.
        key: what they are called.
        most: of a number.

    Raises:
        WeightsError: it names the setting.
    """
    if isinstance(value, dict):
        side, patches = value.get("patch_size"), value.get("max_num_patches")
        if isinstance(side, int) and isinstance(patches, int) and side**2 * patches > _MOST**2:
            raise WeightsError(f"asks for {patches} patches of {side} pixels", where=str(where))
        for inner, part in value.items():
            refuse_sizes(part, where, inner, most)
    elif isinstance(value, list):
        for part in value:
            refuse_sizes(part, where, key, most)
    elif isinstance(value, (int, float)) and not key.endswith(_IDS):
        small = key == "crop_pct" and value < _LEAST_CROP
        if small or not abs(value) <= _MORE.get(key, most):
            raise WeightsError(f"asks for {key} = {value:.6g}", where=str(where))

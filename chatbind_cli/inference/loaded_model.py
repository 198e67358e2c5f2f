"""Loads what answering needs: a model, its identity, and the encoder that belongs to it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.checkpoints.projector_file import read_projector
from chatbind_cli.device import resolve_device, resolve_dtype
from chatbind_cli.encoders.encoder import Encoder
from chatbind_cli.encoders.identity import identity_of
from chatbind_cli.encoders.opening import open_encoder, open_encoders, usual_encoder
from chatbind_cli.encoders.reference import is_reference
from chatbind_cli.errors import CheckpointError, UsageError
from chatbind_cli.files import sha256_file, sha256_text
from chatbind_cli.inference.placing import check_device_map, resolve_numbers, spread
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.model.adapters import merge_adapters, read_adapters
from chatbind_cli.model.assemble import build_chatbind
from chatbind_cli.model.attention import resolve_attention
from chatbind_cli.model.base import adapted_base, find_base
from chatbind_cli.model.config import EncoderInfo, check_encoder, encoder_of, saved_end_ids
from chatbind_cli.model.loading import ChatBind, load_chatbind
from chatbind_cli.model.quantization import quantization

# Files of a model folder that decide an answer, beside config.json: weights, what says where they
# are or changes them, tokenizers of every kind, chat templates.
_DECIDING = re.compile(
    r".*\.(safetensors|bin|pth?|model|tiktoken|jinja)|.*\.index\.json|adapter_config\.json|"
    r"(tokenizer|special_tokens_map|added_tokens|vocab|merges|chat_template).*\.(json|txt|bpe)"
)
# What config.json says of where a model came from, and how it is held: no answer depends on it.
_ORIGIN = {
    "_name_or_path",
    "_commit_hash",
    "architectures",
    "dtype",
    "licence",
    "name",
    "path",
    "provenance",
    "torch_dtype",
    "transformers_version",
}
_FETCH = "fetch it with `chatbind download imagebind-huge` and "


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, and where it came from.

    Args:
        bundle: model, tokenizer and configuration; in eval mode, on `device`.
        path: its folder.
        projector: the projector file, where the folder holds a bare language model.
        device: where it runs, or its first layers do, and the encoder with them.
        dtype: type of its weights.
        encoders: what opens the encoder, or the several, as the user says it; none: where the
            model says that they are, else one of the usual places.
        allow_encoder_mismatch: take an encoder whose weights are not those of training.
        encoder_dtype: type of the encoder's weights; None: as for the model.
        adapter: the folder of adapters that were put beside its matrices.
        held: what answers say of how the model is held, beside its dtype.
    """

    bundle: ChatBind
    path: Path
    projector: Path | None
    device: torch.device
    dtype: torch.dtype
    encoders: Sequence[str | Path] = ()
    allow_encoder_mismatch: bool = False
    encoder_dtype: torch.dtype | None = None
    adapter: Path | None = None
    held: Mapping[str, str] = field(default_factory=dict)

    @property
    def model_id(self) -> str:
        """A short name for records, made of folder and file names."""
        names = [self.path.resolve().name]
        names += [] if self.projector is None else [self.projector.stem]
        names += [] if self.adapter is None else [self.adapter.resolve().name]
        return "+".join(names)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over everything in the folders that decides an answer, whatever it is called.

        Weights, tokenizer and chat templates as they are; of config.json all but what only tells
        where the model came from; of generation_config.json the end tokens. Reads all weights
        once; the hashes of large files are remembered in the user's cache.
        """
        parts = _deciding_parts(self.path)
        if self.projector is not None:
            parts["projector"] = sha256_file(self.projector)
        if self.adapter is not None:
            parts["adapter"] = _deciding_parts(self.adapter)
        return json_sha256(parts)

    def identity(self) -> dict[str, Any]:
        """What answers say of the model: which one, and how it is held."""
        numbers = str(self.dtype).removeprefix("torch.")
        return {"model_sha256": self.sha256, "dtype": numbers, **self.held}

    def media_options(self, **changes: Any) -> MediaOptions:
        """How media became tensors when the model was trained, but for what the user changes."""
        return MediaOptions.known({**(self.bundle.config.media_options or {}), **changes})

    @property
    def encoder_sha256(self) -> str | None:
        """The hash of the encoder's weights that embeddings must come from, if there is one."""
        known = self.bundle.config.encoder or {}
        return None if self.allow_encoder_mismatch else known.get("sha256")

    def find_encoder(self) -> Encoder:
        """Opens the encoder that the model needs; its towers are read when they are needed.

        Raises:
            CheckpointError: it is not there, or it is another one.
            WeightsError: its weights are broken.
        """
        config = self.bundle.config
        own = encoder_of(config)
        places = list(self.encoders) or [self._place(one) for one in own.each]
        how = {"device": self.device, "dtype": self.encoder_dtype or self.dtype}
        # what others have written into config.json is no wish to fetch something
        encoder = open_encoders(places, **how, fetch=bool(self.encoders))
        # hashing 5 GB is left out where there is nothing to compare with
        info = identity_of(encoder, hashed=self.encoder_sha256 is not None)
        try:
            check_encoder(config, info, where=" + ".join(map(str, places)), same_dtype=False)
        except CheckpointError as error:
            hint = error.hint
            if info.widths == own.widths:
                hint = f"{hint}, or take what is named with --allow-encoder-mismatch"
            raise CheckpointError(error.what, where=error.where, hint=hint) from error
        return encoder

    def _place(self, one: EncoderInfo) -> str | Path:
        """Where one of its encoders is: as config.json says, a path from here or its folder.

        Raises:
            CheckpointError: not there, nor in a usual place.
        """
        said = "and does not say where it is"
        if one.path:
            if is_reference(one.path):
                return one.path
            for folder in (Path(), self.path, self.adapter or self.path):
                if (folder / one.path).exists():
                    return folder / one.path
            said = f"which is not at {one.path} any more"
        usual = usual_encoder()
        pinned = None if self.allow_encoder_mismatch else one.sha256
        if usual is not None and pinned in (None, open_encoder(usual).sha256):
            return usual
        hint = "name it with --encoder"
        each = encoder_of(self.bundle.config).each
        if len(each) > 1:
            words = " ".join(f"--encoder {other.name}" for other in each)
            hint = f"name all of them, in this order: {words}"
        raise CheckpointError(
            f"the model needs the encoder {one.name}, {said}",
            where=str(self.path),
            hint=_FETCH + hint if one.name.startswith("imagebind") else hint,
        )


def json_sha256(value: Any) -> str:
    """SHA-256 of a value of JSON's types, whatever the order of its keys."""
    return sha256_text(json.dumps(value, sort_keys=True))


def _deciding_parts(folder: Path) -> dict[str, Any]:
    """Hashes of the files of a folder that decide answers, and what decides them in its configs."""
    files = {
        name: file
        for file in sorted(folder.rglob("*"))
        if _DECIDING.fullmatch(name := file.relative_to(folder).as_posix())
        and ("/" not in name or file.suffix == ".jinja")
    }
    parts: dict[str, Any] = {name: sha256_file(file) for name, file in files.items()}
    parts["config"] = _without_origin(read_json(folder / "config.json", missing_ok=True))
    parts["end_ids"] = saved_end_ids(folder)
    return parts


def _without_origin(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_origin(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {k: _without_origin(part) for k, part in value.items() if k not in _ORIGIN}


def load_model(
    path: Path,
    *,
    projector: Path | None = None,
    base: Path | None = None,
    adapter: Path | None = None,
    encoders: Sequence[str | Path] = (),
    allow_encoder_mismatch: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    attn_implementation: str = "auto",
    device_map: str | None = None,
    load_in: str | None = None,
) -> LoadedModel:
    """Loads a ChatBind model, or a bare language model and a projector.

    Adapters become part of the matrices that they stand beside, unless those are packed. What the
    words mean: see `LoadedModel`, `device`, `placing`, `resolve_attention`, `quantization`.

    Raises:
        CheckpointError: a folder cannot be used.
        UsageError: there is no such device, dtype or attention, or the words do not go together.
    """
    check_device_map(device_map, device)
    place = resolve_device("cpu" if device_map == "cpu" else device)
    folder, below = _whole_model(path, projector, base, adapter)
    numbers = resolve_numbers(dtype, place, below or folder)
    attention = resolve_attention(attn_implementation, place, numbers)
    held: dict[str, Any] = {"dtype": numbers, "attn_implementation": attention}
    if load_in is not None:
        bits = int(load_in.removesuffix("bit"))
        held["quantization"] = quantization(bits, numbers, place.type, f"--load-in {load_in}")
        held["device_map"] = device_map or {"": place.index}
    if projector is None:
        bundle = load_chatbind(folder, base=below, merge=load_in is None, **held)
    else:
        info = read_projector(projector).info
        bundle = build_chatbind(
            path,
            encoder=encoder_of(info),
            projector=projector,
            media_options=info.media_options,
            **held,
        )
    if adapter is not None and folder != adapter:
        read_adapters(bundle.model.language_model, adapter)
        if load_in is None:
            merge_adapters(bundle.model.language_model)
    _put(bundle.model, place, numbers, device_map, packed=load_in is not None)
    said = {"load_in": load_in, "attn_implementation": attn_implementation}
    model = LoadedModel(bundle, path, projector, place, numbers, encoders, allow_encoder_mismatch)
    return replace(
        model,
        encoder_dtype=resolve_dtype(dtype, place),
        adapter=adapter,
        held={name: word for name, word in said.items() if word not in (None, "auto")},
    )


def _whole_model(
    path: Path, projector: Path | None, base: Path | None, adapter: Path | None
) -> tuple[Path, Path | None]:
    """The folder to load, and the one of the model that the adapters in it belong to.

    `finetune` saves adapters with their projector and tokenizer: they make a model of another.

    Raises:
        UsageError: the words do not go together.
        CheckpointError: something is not there.
    """
    if adapter is not None and adapted_base(adapter) is not None:
        if projector is not None or base is not None:
            raise UsageError(
                f"--adapter {adapter} has its own projector, and goes with --model alone"
            )
        return adapter, path
    if projector is None:
        _refuse_stage_1(path)
        return path, base if adapted_base(path) is None else find_base(path, base)
    if base is not None:
        raise UsageError("--base goes with a folder of adapters, and --projector with none")
    if not path.is_dir():
        raise CheckpointError(
            "no such folder",
            where=str(path),
            hint="`chatbind download hf:OWNER/NAME` fetches a language model",
        )
    return path, None


def _put(
    model: Any, place: torch.device, dtype: torch.dtype, device_map: str | None, *, packed: bool
) -> None:
    """Brings a model to where it answers; one with packed weights is there."""
    model.projector.to(dtype)
    if not packed and device_map in ("auto", "balanced"):
        spread(model)
    elif not packed:
        model.to(place)
    model.eval()


def _refuse_stage_1(folder: Path) -> None:
    """Says what to do with a folder of `pretrain`, which holds a projector and no language model.

    Raises:
        CheckpointError: it is one.
    """
    projector = folder / "projector.safetensors"
    if projector.is_file() and not any(folder.glob("*model*.safetensors")):
        raise CheckpointError(
            "a folder of `pretrain` has a projector and no language model",
            where=str(folder),
            hint=f"give the language model with --model, and --projector {projector}",
        )

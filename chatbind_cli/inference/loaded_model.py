"""Loads what answering needs: a model, its identity, and the encoder that belongs to it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.checkpoints.projector_file import read_projector
from chatbind_cli.device import resolve_device, resolve_dtype
from chatbind_cli.encoders.imagebind.config import usual_encoder
from chatbind_cli.encoders.imagebind.encoder import Encoder, load_encoder
from chatbind_cli.errors import CheckpointError, UsageError
from chatbind_cli.files import sha256_file, sha256_text
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.model.assemble import build_chatbind
from chatbind_cli.model.attention import resolve_attention
from chatbind_cli.model.config import EncoderInfo, check_encoder, encoder_of, saved_end_ids
from chatbind_cli.model.loading import ChatBind, load_chatbind

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
    "name",
    "path",
    "provenance",
    "torch_dtype",
    "transformers_version",
}
_GET_ONE = "fetch it with `chatbind download imagebind-huge` and name it with --encoder"


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, and where it came from.

    Args:
        bundle: model, tokenizer and configuration; in eval mode, on `device`.
        path: its folder.
        projector: the projector file, where the folder holds a bare language model.
        device: where it runs, and the encoder with it.
        dtype: type of its weights, and of the encoder's.
        encoder: where the user says that the encoder is; None: where the model says, else one of
            the usual places.
        allow_encoder_mismatch: take an encoder whose weights are not those of training.
    """

    bundle: ChatBind
    path: Path
    projector: Path | None
    device: torch.device
    dtype: torch.dtype
    encoder: Path | None = None
    allow_encoder_mismatch: bool = False

    @property
    def model_id(self) -> str:
        """A short name for records, made of folder and file names."""
        name = self.path.resolve().name
        return name if self.projector is None else f"{name}+{self.projector.stem}"

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over everything in the folder that decides an answer, whatever it is called.

        Weights, tokenizer and chat templates as they are; of config.json all but what only tells
        where the model came from; of generation_config.json the end tokens. Reads all weights
        once; the hashes of large files are remembered in the user's cache.
        """
        files = {
            name: file
            for file in sorted(self.path.rglob("*"))
            if _DECIDING.fullmatch(name := file.relative_to(self.path).as_posix())
            and ("/" not in name or file.suffix == ".jinja")
        }
        parts: dict[str, Any] = {name: sha256_file(file) for name, file in files.items()}
        if self.projector is not None:
            parts["projector"] = sha256_file(self.projector)
        parts["config"] = _without_origin(read_json(self.path / "config.json"))
        parts["end_ids"] = saved_end_ids(self.path)
        return json_sha256(parts)

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
        path = self.encoder or self._encoder_path()
        encoder = load_encoder(path, device=self.device, dtype=self.dtype)
        info = EncoderInfo(
            name=encoder.name,
            # hashing 5 GB is left out where there is nothing to compare with
            sha256=encoder.sha256 if self.encoder_sha256 else None,
            embedding_dim=encoder.embedding_dim,
        )
        try:
            check_encoder(config, info, where=str(path))
        except CheckpointError as error:
            same_width = info.embedding_dim == config.embedding_dim
            hint = f"{error.hint}, or take this one with --allow-encoder-mismatch"
            raise CheckpointError(
                error.what, where=error.where, hint=hint if same_width else error.hint
            ) from error
        return encoder

    def _encoder_path(self) -> Path:
        """The place that the model's config names: absolute, or from the model's folder."""
        known = self.bundle.config.encoder or {}
        name = str(known.get("name") or "imagebind")
        said = "and does not say where it is"
        if known.get("path"):
            written = Path(str(known["path"]))
            for path in (written, self.path / written):
                if path.exists():
                    return path
            said = f"which is not at {written} any more"
        usual = usual_encoder()
        if usual is not None:
            return usual
        raise CheckpointError(
            f"the model needs the encoder {name}, {said}",
            where=str(self.path),
            hint=_GET_ONE,
        )


def json_sha256(value: Any) -> str:
    """SHA-256 of a value of JSON's types, whatever the order of its keys."""
    return sha256_text(json.dumps(value, sort_keys=True))


def _without_origin(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: _without_origin(part) for k, part in value.items() if k not in _ORIGIN}


def load_model(
    path: Path,
    *,
    projector: Path | None = None,
    base: Path | None = None,
    encoder: Path | None = None,
    allow_encoder_mismatch: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    attn_implementation: str = "auto",
) -> LoadedModel:
    """Loads a ChatBind model, or a bare language model and a projector.

    Adapters become part of the matrices that they stand beside. The encoder is looked for when it
    is needed. What the words mean: see `load_chatbind`, `LoadedModel`, `resolve_device`,
    `resolve_dtype`, `resolve_attention`.

    Raises:
        CheckpointError: the folder cannot be used.
        UsageError: there is no such device, dtype or attention.
    """
    place = resolve_device(device)
    numbers = resolve_dtype(dtype, place)
    attention = resolve_attention(attn_implementation, place, numbers)
    if projector is None:
        _refuse_stage_1(path)
        bundle = load_chatbind(
            path, dtype=numbers, device=place, attn_implementation=attention, base=base
        )
    else:
        if base is not None:
            raise UsageError("--base goes with a folder of adapters, and --projector with none")
        if not path.is_dir():
            raise CheckpointError(
                "no such folder",
                where=str(path),
                hint="`chatbind download hf:OWNER/NAME` fetches a language model",
            )
        info = read_projector(projector).info
        bundle = build_chatbind(
            path,
            encoder=encoder_of(info),
            projector=projector,
            media_options=info.media_options,
            dtype=numbers,
            attn_implementation=attention,
        )
        bundle.model.projector.to(bundle.model.language_model.dtype)
        bundle.model.to(place)  # type: ignore[arg-type]  # transformers' wrapper hides the types
        bundle.model.eval()
    return LoadedModel(bundle, path, projector, place, numbers, encoder, allow_encoder_mismatch)


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

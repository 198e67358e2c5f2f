"""A medium as a record, an option or a program names it, from there to its embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatbind_cli.errors import RecordError, UsageError
from chatbind_cli.media.modality import MODALITIES

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Medium:
    """One medium of a question or conversation.

    Args:
        modality: what it is; None: the content has to tell.
        ref: a path, a URL, a data URI, `-` for standard input, or the bytes themselves.
        weight: what its embedding is multiplied by, after it was brought to norm 1 (where the
            model does that).
        sha256: hash of its content, once that was read.
        embedding: float32 [embedding_dim], once the encoder made it, as that publishes it: not
            normalised.
    """

    modality: str | None
    ref: str | Path | bytes
    weight: float = 1.0
    sha256: str | None = field(default=None, compare=False)
    embedding: torch.Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        """What to call it: the path or address as it was given."""
        return "<bytes>" if isinstance(self.ref, bytes) else str(self.ref)


def media_of_record(record: Mapping[str, Any], *, where: str | None = None) -> tuple[Medium, ...]:
    """The media that a record names under its modality keys, in the order of its keys.

    Raises:
        RecordError: such a key holds neither a name nor a list of names.
    """
    media: list[Medium] = []
    for key, value in record.items():
        if key not in MODALITIES or value is None:
            continue
        names = value if isinstance(value, list) else [value]
        for name in names:
            if not isinstance(name, str) or not name:
                raise RecordError(f"{key} must be a file name or a list of them", where=where)
            media.append(Medium(key, name))
    return tuple(media)


def parse_attachment(text: str, modality: str | None = None) -> Medium:
    """Reads the `FILE` or `FILE@WEIGHT` of an option.

    A file whose name really ends in `@0.5` is meant as that file.

    Raises:
        UsageError: there is no name, or the weight is not a finite number.
    """
    name, at, number = text.rpartition("@")
    if not at or "/" in number or is_there(text):
        return _named(text, modality, 1.0)
    try:
        weight = float(number)
    except ValueError:
        return _named(text, modality, 1.0)
    if not math.isfinite(weight):
        raise UsageError(f"{text}: the weight {number} is not a finite number")
    return _named(name, modality, weight)


def _named(ref: str, modality: str | None, weight: float) -> Medium:
    if not ref:
        raise UsageError("an attachment has no file name", hint="write FILE or FILE@0.5")
    return Medium(modality, ref, weight)


def is_there(text: str) -> bool:
    """Whether a text names a file or folder here."""
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False

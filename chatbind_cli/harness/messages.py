"""What lmms-eval asks -> questions: messages with media of Python's own types, and settings."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import wavfile

from chatbind_cli.errors import RecordError
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.media.modality import MODALITIES

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def as_chat(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages of a task in the form of a request to `/v1/chat/completions`.

    A part is `{"type": "text", "text"}`, or `{"type": MODALITY, "url"}` with a path, an address, a
    PIL image, a waveform (`array`, `sampling_rate`), or bytes. Others stay as they are.

    Raises:
        RecordError: a medium is none of these.
    """
    return [{**message, "content": _content(message.get("content"))} for message in messages]


def _content(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [
        _medium(part) if isinstance(part, dict) and part.get("type") in MODALITIES else part
        for part in content
    ]


def _medium(part: Mapping[str, Any]) -> dict[str, Any]:
    modality = part["type"]
    if part.get("start_time") is not None or part.get("end_time") is not None:
        raise RecordError(f"a stretch of a {modality} cannot be asked about, only all of it")
    return {"type": "media", "modality": modality, "url": _address(part.get("url"), modality)}


def _address(medium: Any, modality: str) -> str:
    """A path or address as it is; else a data URI of what there is in memory."""
    if isinstance(medium, str) and medium:
        return medium
    content = io.BytesIO()
    if isinstance(medium, Image.Image):
        drawn = medium if medium.mode in _PNG_MODES else medium.convert("RGB")
        drawn.save(content, "PNG", compress_level=1)
    elif isinstance(medium, bytes):
        content.write(medium)
    elif isinstance(medium, Mapping) and (medium.get("bytes") or medium.get("path")):
        return _address(medium.get("bytes") or medium["path"], modality)
    elif modality == "audio":
        # a dictionary, or the decoder that `datasets` has in its place
        try:
            samples = np.asarray(medium["array"], np.float32)
            wavfile.write(content, int(medium["sampling_rate"]), samples.T)
        except Exception as error:  # a decoder may raise what it likes
            raise RecordError(f"a {type(medium).__name__} is no sound that can be read") from error
    else:
        raise RecordError(f"a {type(medium).__name__} cannot be read as {modality}")
    return f"data:;base64,{base64.b64encode(content.getvalue()).decode()}"


def settings_of(wanted: Mapping[str, Any]) -> GenerationSettings:
    """The `generation_kwargs` of a task; what is not known here has no influence.

    As with the models of lmms-eval, `do_sample` alone draws at temperature 1, and without it a
    temperature does.

    Raises:
        UsageError: a value is of another type, or out of range.
    """
    names = {field.name for field in fields(GenerationSettings)}
    own = {k: value for k, value in wanted.items() if k in names and value is not None}
    if wanted.get("do_sample"):
        own.setdefault("temperature", 1.0)
    elif wanted.get("do_sample") is not None:
        own["temperature"] = 0.0
    if not own.get("temperature"):
        # tasks write a top_p of 0 beside it
        own = {k: value for k, value in own.items() if k not in ("top_p", "top_k", "min_p")}
    until = wanted.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    return GenerationSettings().changed({**own, "stop": [text for text in stops if text]})

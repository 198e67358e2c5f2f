"""OpenAI's embeddings: vectors of media and texts in the encoder's one space."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from torch.nn import functional

from chatbind_cli.errors import ChatBindError
from chatbind_cli.inference.openai_chat import RequestError, check_model, read_part
from chatbind_cli.json_text import Record
from chatbind_cli.media.medium import Medium
from chatbind_cli.serving.desk import BusyError, Desk
from chatbind_cli.serving.limits import Limits

_READ = {"model", "input", "encoding_format", "user"}
_FORMATS = ("float", "base64")
_AT_ONCE = 8  # between two lots, the questions' own media are embedded


class Embeddings:
    """Answers requests for embeddings.

    Args:
        desk: has the encoder.
        model_id: what the model is called.
        limits: how much may be asked for.
    """

    def __init__(self, desk: Desk, model_id: str, limits: Limits) -> None:
        self._desk = desk
        self._model_id = model_id
        self._limits = limits
        self._busy = 0

    def read(self, body: Record) -> tuple[list[Medium], str]:
        """The media and texts that a request names, and how it wants their vectors.

        Raises:
            RequestError: it cannot be answered as it stands.
        """
        check_model(body.get("model") or self._model_id, self._model_id)
        for name in body.keys() - _READ:
            raise RequestError("is no parameter that is known here", name[:60])
        form = body.get("encoding_format") or "float"
        if form not in _FORMATS:
            raise RequestError(f"is one of {', '.join(_FORMATS)}", "encoding_format")
        return self._media(body.get("input")), form

    async def reply(self, media: Sequence[Medium], form: str) -> Record:
        """Their vectors, of norm 1, in order.

        Raises:
            BusyError: too many are being answered.
            ChatBindError: why one of the media has no embedding.
        """
        if self._busy >= self._limits.waiting:
            raise BusyError("too many embeddings are asked for")
        self._busy += 1
        try:
            data: list[Record] = []
            for start in range(0, len(media), _AT_ONCE):
                for found in await self._desk.embed(media[start : start + _AT_ONCE]):
                    data.append(_vector(found, len(data), form))
        finally:
            self._busy -= 1
        usage = {"prompt_tokens": 0, "total_tokens": 0}
        return {"object": "list", "data": data, "model": self._model_id, "usage": usage}

    def _media(self, asked: Any) -> list[Medium]:
        inputs = asked if isinstance(asked, list) else [asked]
        if not 0 < len(inputs) <= self._limits.inputs:
            most = self._limits.inputs
            raise RequestError(f"has {len(inputs)} texts and media, and 1 to {most} go", "input")
        return [self._medium(one, f"input[{n}]") for n, one in enumerate(inputs)]

    def _medium(self, given: Any, param: str) -> Medium:
        if type(given) is int or isinstance(given, list):
            raise RequestError("is no text: tokens are not read", param)
        part = given if isinstance(given, str) else read_part(given, param)
        if isinstance(part, Medium):
            return part
        if not part.strip():
            raise RequestError("is an empty text", param)
        if len(part) > self._limits.text_characters:
            most = self._limits.text_characters
            raise RequestError(f"has {len(part):,} characters, and {most:,} are the most", param)
        return Medium("text", part)


def _vector(found: Medium | ChatBindError, index: int, form: str) -> Record:
    if isinstance(found, ChatBindError):
        raise found
    assert found.embedding is not None
    row = functional.normalize(found.embedding, dim=-1)
    told: Any = row.tolist()
    if form == "base64":
        told = base64.b64encode(row.numpy().astype("<f4").tobytes()).decode("ascii")
    return {"object": "embedding", "index": index, "embedding": told}

"""What a model remembers of the encoder that it was trained with."""

from __future__ import annotations

from chatbind_cli.encoders.encoder import Encoder
from chatbind_cli.model.config import EncoderInfo


def identity_of(encoder: Encoder, *, hashed: bool = True) -> EncoderInfo:
    """What a model says of the encoder whose embeddings it reads; its hash reads its weights."""
    parts = encoder.parts if len(encoder.parts) > 1 else ()
    return EncoderInfo(
        name=encoder.name,
        sha256=encoder.sha256 if hashed else None,
        embedding_dim=encoder.embedding_dim,
        path=encoder.reference,
        dtype=encoder.dtype_name,
        licence=encoder.licence,
        parts=tuple(identity_of(part, hashed=hashed) for part in parts),
        sha256_before=encoder.sha256_before if hashed else frozenset(),
    )

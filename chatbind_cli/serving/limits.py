"""What a server allows: sizes, numbers and times."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Each is there so that one client cannot take what all need."""

    body_bytes: int = 64 << 20
    """Of a request; the reader of JSON takes no more."""
    bodies: int = 8
    """Bodies of that size, over all requests, whose answers are not there yet."""
    values: int = 1_000_000
    """Numbers, texts and the like in a body, and commas in its texts."""
    waiting: int = 256
    """Questions that wait for their first token."""
    connections: int = 512
    """Clients that are connected, idle ones, too."""
    request_s: float = 600.0
    """From a request's last byte to the last of its answer."""
    grace_s: float = 30.0
    """For answers that are under way when the server is told to stop."""
    body_s: float = 20.0
    """For a body; one that is longer than that gets more, see `body_rate`."""
    body_rate: int = 100_000
    """Bytes a second that a body must come at, after that time."""
    idle_s: float = 30.0
    """For a request's head, from the connection's beginning or the answer before it on."""
    stalled_s: float = 30.0
    """For a client that reads nothing of its answer."""
    inputs: int = 256
    """Media and texts of a request for embeddings."""
    text_characters: int = 10_000
    """Of a text to be embedded; the text tower reads its first 77 tokens."""

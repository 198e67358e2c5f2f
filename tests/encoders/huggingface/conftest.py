from __future__ import annotations

from tests.recordings import film, sound

__all__ = ["film", "sound"]

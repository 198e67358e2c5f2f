from __future__ import annotations

from tests.recordings import clip_greys, film, sound

__all__ = ["clip_greys", "film", "sound"]

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recordings import film, sound

__all__ = ["film", "sound"]


@pytest.fixture(scope="session")
def small(golden: Path) -> Path:
    """Numbers of the reference for small random repositories."""
    folder = golden / "languagebind_small"
    if not folder.is_dir():
        pytest.skip("needs ../shared/golden/languagebind_small")
    return folder

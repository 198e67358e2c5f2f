"""The README names every command."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatbind_cli.cli import COMMANDS

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_named(name):
    assert f"`{name}" in README or f"chatbind {name}" in README

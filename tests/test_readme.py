"""The README knows every file of the house and every command."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatbind_cli.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROOMS = sorted({path.parent for path in (ROOT / "chatbind_cli").rglob("*.py")})


def listed(room):
    """File name -> what the map says of it."""
    lines = iter(README.splitlines())
    next(line for line in lines if line.startswith(f"{room}/ "))
    rows = {}
    for line in lines:
        if not line.startswith("  "):
            return rows
        name, words = line.split(maxsplit=1)
        rows[name] = words
    raise AssertionError("the map does not end")


@pytest.mark.parametrize("folder", ROOMS, ids=lambda folder: folder.name)
def test_the_map_lists_exactly_the_files_that_are_there(folder):
    rows = listed(folder.relative_to(ROOT).as_posix())
    files = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    assert {name for name in rows if name.endswith(".py")} == files
    assert [words for words in rows.values() if len(words.split()) > 5] == []


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_named(name):
    assert f"`{name}" in README or f"chatbind {name}" in README

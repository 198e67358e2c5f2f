"""`--encoder`, the same in every command: paths, references, one or several."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from chatbind_cli import cli


@pytest.fixture(autouse=True)
def show(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> click.Command:
    """A command `show` with the option, put into the program for one test."""
    base = importlib.import_module("chatbind_cli.commands._base")
    options = importlib.import_module("chatbind_cli.commands._options")

    @base.command("show", examples=["chatbind show", "chatbind show --encoder a"])
    @options.encoder_option("Model", "Sees.")
    def show(encoder: tuple[str, ...]) -> None:
        """Show the values."""
        for word in encoder:
            click.echo(f"<{word}>")

    monkeypatch.setitem(cli.app.commands, "show", show)
    monkeypatch.setitem(cli.COMMANDS, "show", "Show.")
    monkeypatch.chdir(tmp_path)
    for name in ("a b", "hf:there"):
        Path(name).mkdir()
    found: click.Command = show
    return found


def shown(*words: str) -> Any:
    result = CliRunner().invoke(cli.app, ["show", *words], obj=["show", *words])
    return result.output.split("\n")[:-1] if result.exit_code == 0 else result.exit_code


def test_paths_and_references_come_as_they_are_in_their_order(tmp_path: Path) -> None:
    words = ["hf:owner/name", str(tmp_path), "timm:vit_small.augreg", "a b", "hf:there"]
    assert shown(*[f"--encoder={word}" for word in words]) == [f"<{word}>" for word in words]
    assert shown() == []


@pytest.mark.parametrize("word", ["nowhere", "./hf:x", "no/such:name", "x" * 5000])
def test_what_is_neither_is_refused_at_the_door_in_one_line(word: str) -> None:
    code, message = cli.run(["show", "--encoder", word])
    assert code == 2
    assert message is not None
    assert message.splitlines()[-1].startswith("Error: Invalid value for '--encoder'")


def test_the_environment_and_the_config_file_say_one_or_several(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "c.toml").write_text('[show]\nencoder = "a b"\n')
    assert shown("--config", "c.toml") == ["<a b>"]
    (tmp_path / "c.toml").write_text('encoder = ["hf:x/y", "a b"]\n')
    assert shown("--config", "c.toml") == ["<hf:x/y>", "<a b>"]
    (tmp_path / "d.toml").write_text("encoder = [3]\n")
    assert shown("--config", "d.toml") == 2
    monkeypatch.setenv("CHATBIND_SHOW_ENCODER", "a b")
    assert shown("--config", "c.toml") == ["<a b>"]
    monkeypatch.setenv("CHATBIND_SHOW_ENCODER", "hf:x/y\na b\n")
    assert shown() == ["<hf:x/y>", "<a b>"]


def test_files_are_completed(show: click.Command) -> None:
    class Complete(ShellComplete):
        name = source_template = "none"

    offered = Complete(show, {}, "show", "_C").get_completions(["--encoder"], "a")
    assert [one.type for one in offered] == ["file"]

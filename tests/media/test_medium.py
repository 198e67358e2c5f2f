"""`FILE@WEIGHT` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatbind_cli.errors import UsageError
from chatbind_cli.media.medium import Medium, parse_attachment


@pytest.mark.parametrize(
    ("text", "ref", "weight"),
    [
        ("a.jpg", "a.jpg", 1.0),
        ("a.jpg@0.5", "a.jpg", 0.5),
        ("-@-2", "-", -2.0),
        ("me@home.jpg", "me@home.jpg", 1.0),
        ("https://me@host/0.5", "https://me@host/0.5", 1.0),
        ("@home/x@1e-1", "@home/x", 0.1),
    ],
)
def test_a_number_after_the_last_at_sign_is_a_weight(text: str, ref: str, weight: float) -> None:
    assert parse_attachment(text, "image") == Medium("image", ref, weight)


def test_a_file_that_is_really_called_so_is_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x@2").touch()
    assert parse_attachment("x@2") == Medium(None, "x@2")


@pytest.mark.parametrize("text", ["", "@0.5", "a.jpg@nan", "a.jpg@inf"])
def test_no_name_and_no_finite_weight_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_attachment(text)

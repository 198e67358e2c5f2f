"""The loss curve."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chatbind_cli.training.log import plot_loss, smoothed

RECORDS = [{"step": n, "loss": 5 / n, "learning_rate": n / 10} for n in range(1, 9)]
RECORDS.insert(4, {"step": 4, "eval_loss": 2.0})


def test_the_same_log_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg", "a.png", "b.png"):
        plot_loss(RECORDS, tmp_path / name, title="pretrain")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()


def test_every_step_is_a_point_of_the_curve(tmp_path: Path) -> None:
    records = [{"step": n, "loss": float(n % 3)} for n in range(40)]
    plot_loss(records, tmp_path / "loss.svg", title="")
    paths = re.findall(r'<path d="([^"]*)"', (tmp_path / "loss.svg").read_text())
    # a line of 40 points is drawn by one "move to" and 39 "line to"; another one smooths it
    assert [path.count("L ") for path in paths].count(39) == 2


def test_a_smoothed_line_starts_at_the_first_value_and_forgets_it() -> None:
    means = smoothed([8.0] + [2.0] * 199)
    assert means[0] == 8.0
    assert means[1] == pytest.approx((0.9 * 8 + 2) / 1.9)
    assert means[-1] == pytest.approx(2.0, abs=1e-6)


def test_an_empty_log_is_drawn_too(tmp_path: Path) -> None:
    plot_loss([], tmp_path / "loss.pdf", title="nothing")
    assert (tmp_path / "loss.pdf").read_bytes().startswith(b"%PDF")

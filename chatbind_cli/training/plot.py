"""The loss curve of a training run as a picture.

Reads log records; knows nothing of how they came to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from chatbind_cli.files import replace_file
from chatbind_cli.jsonl import Record
from chatbind_cli.training.rundir import PICTURE_MARK


def plot_loss(records: Sequence[Record], path: Path, *, title: str) -> None:
    """Draws loss and learning rate over steps.

    The same records give the same file, byte for byte, so that a rerun does not change it.

    Args:
        records: log records with `step` and `loss` (and `learning_rate`, `eval_loss`).
        path: the picture; its suffix (.svg, .png, .pdf) says the format.
        title: printed above.
    """
    kind = path.suffix.lower().removeprefix(".")
    figure = Figure(figsize=(7, 4))
    figure.subplots_adjust(left=0.1, right=0.88, bottom=0.13, top=0.92)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, label, colour in (("loss", "loss", "C0"), ("eval_loss", "held-out loss", "C2")):
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        if points:
            marker = "o" if len(points) < 3 or key == "eval_loss" else None
            axes.plot(*zip(*points, strict=True), color=colour, label=label, lw=1, marker=marker)
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    rates = [(r["step"], r["learning_rate"]) for r in records if "learning_rate" in r]
    if rates:
        right = axes.twinx()
        right.plot(*zip(*rates, strict=True), color="C1", lw=1, ls="--", label="learning rate")
        right.set_ylabel("learning rate")
        right.set_ylim(bottom=0)
    if axes.lines:
        figure.legend(loc="upper right", bbox_to_anchor=(0.88, 0.9), fontsize="small")
    with mpl.rc_context({"svg.hashsalt": "chatbind"}), replace_file(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=150, metadata=_METADATA[kind])


_METADATA: dict[str, dict[str, str | None]] = {
    "svg": {"Date": None, "Creator": PICTURE_MARK},
    "png": {"Software": PICTURE_MARK},
    "pdf": {"CreationDate": None, "Creator": PICTURE_MARK},
}

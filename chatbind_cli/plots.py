"""Plots that commands draw: the formats, and how ours are told from anybody else's pictures."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from chatbind_cli.errors import UsageError
from chatbind_cli.files import bears, refuse_foreign_file, replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARK = "chatbind"
# a picture says whose it is, and nothing of when it was made
_METADATA: Final[dict[str, dict[str, str | None]]] = {
    ".svg": {"Date": None, "Creator": f"{_MARK} "},
    ".png": {"Software": f"{_MARK} "},
    ".pdf": {"CreationDate": None, "Creator": f"{_MARK} "},
}


def check_plot(path: Path) -> None:
    """Refuses a path, given as --plot, that `save_plot` could not, or should not, write.

    Raises:
        UsageError: its suffix is of no format that we draw.
        ChatBindError: somebody else's file is there.
    """
    if path.suffix.lower() not in _METADATA:
        raise UsageError(
            f"--plot {path} has no suffix that we draw", hint=f"end it in {', '.join(_METADATA)}"
        )
    refuse_foreign_file(path, partial(bears, mark=f"{_MARK} ".encode()), what="a picture of ours")


def save_plot(figure: Figure, path: Path, kind: str) -> None:
    """Writes a plot, whole or not at all; the same figure gives the same file.

    Args:
        figure: what is drawn.
        path: its suffix (.svg, .png, .pdf) says the format.
        kind: of plot, noted in the file.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    suffix = path.suffix.lower()
    told = {k: v and v + kind for k, v in _METADATA[suffix].items()}
    FigureCanvasAgg(figure)
    with mpl.rc_context({"svg.hashsalt": _MARK}), replace_file(path) as temporary:
        figure.savefig(temporary, format=suffix[1:], dpi=150, metadata=told)

"""The media of a report: which files, how much of them, and what to say where one cannot be shown.

Every medium is kept once, however many questions ask about it. Knows nothing of how pictures,
sounds and curves are made (`showing`), and loads that only when there is something to show.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatbind_cli.errors import ChatBindError, MediaError
from chatbind_cli.media.root import MediaRoot

if TYPE_CHECKING:
    from chatbind_cli.review.showing import Shown


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a plot: its name and its points as SVG writes them."""

    name: str
    points: str


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves over the same five seconds.

    Attributes:
        title: what is measured, with its unit.
        curves: x, y and z.
        low: the value at the lower edge.
        high: the value at the upper edge.
    """

    title: str
    curves: tuple[Curve, ...]
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Scale:
    """What false colours mean: the palette's name, and what its two ends stand for."""

    colours: str
    low: str
    high: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Exhibit:
    """One medium as the page shows it.

    Attributes:
        name: what the question calls it.
        modality: what it is.
        tag: `img`, `audio`, `video`, `curves`, or nothing where only the name is shown.
        key: the id of the page's block that holds its data.
        note: what the colours mean, or why it is not shown.
        panels: the plots of `curves`.
        scale: the legend of false colours.
    """

    name: str
    modality: str
    tag: str = ""
    key: str = ""
    note: str = ""
    panels: tuple[Panel, ...] = ()
    scale: Scale | None = None


class Cabinet:
    """Finds media, turns them into what a browser shows, and keeps within a limit.

    Args:
        root: where the media lie; without a folder they are named, not shown.
        limit_bytes: most bytes of media in one page.

    Attributes:
        blocks: data URIs by key, for the page's end.
    """

    def __init__(
        self,
        root: MediaRoot | None = None,
        *,
        limit_bytes: int = 64_000_000,
    ) -> None:
        self.blocks: dict[str, str] = {}
        self._root = root or MediaRoot()
        self._left = limit_bytes
        self._known: dict[tuple[str, str], Exhibit] = {}
        self._failed: list[str] = []
        self._left_out = 0

    @property
    def problems(self) -> list[str]:
        """What is not shown and why, in a line each."""
        lines = []
        if self._failed:
            lines.append(f"{len(self._failed)} media cannot be shown; {self._failed[0]}")
        if self._left_out:
            lines.append(f"{self._left_out} media go beyond --media-limit and are only named")
        return lines

    def show(self, modality: str, names: Sequence[str]) -> list[Exhibit]:
        """The exhibits for a question's media of one modality."""
        return [self._exhibit(modality, name) for name in names]

    def _exhibit(self, modality: str, name: str) -> Exhibit:
        key = (modality, name)
        if key not in self._known:
            self._known[key] = self._made(modality, name)
        return self._known[key]

    def _made(self, modality: str, name: str) -> Exhibit:
        if self._root.folder is None:
            return Exhibit(name=name, modality=modality)
        if self._left <= 0:
            self._left_out += 1
            return Exhibit(name=name, modality=modality, note="beyond the report's media limit")
        try:
            shown = self._shown(modality, name)
        except ChatBindError as error:
            self._failed.append(str(error))
            return Exhibit(name=name, modality=modality, note=f"cannot be shown: {error.what}")
        if shown.panels:
            return Exhibit(
                name=name, modality=modality, tag="curves", note=shown.note, panels=shown.panels
            )
        text = base64.b64encode(shown.data).decode()
        if len(text) > self._left:
            self._left_out += 1
            return Exhibit(name=name, modality=modality, note="beyond the report's media limit")
        self._left -= len(text)
        block = f"media-{len(self.blocks) + 1}"
        self.blocks[block] = f"data:{shown.kind};base64,{text}"
        tag = "img" if shown.kind.startswith("image/") else shown.kind.partition("/")[0]
        return Exhibit(
            name=name,
            modality=modality,
            tag=tag,
            key=block,
            note=shown.note,
            scale=shown.scale,
        )

    def _shown(self, modality: str, name: str) -> Shown:
        from chatbind_cli.media.source import open_source  # noqa: PLC0415
        from chatbind_cli.review.showing import show  # noqa: PLC0415  brings torch

        path = self._root.find(name)
        try:
            return show(open_source(path), modality)
        except OSError as error:
            raise MediaError(error.strerror or "cannot be read", where=str(path)) from error

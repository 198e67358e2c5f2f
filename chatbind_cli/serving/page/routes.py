"""The page at `/`, and how a medium on it looks before one asks about it.

The page is one file, put together from three that stay as they are: no framework, no build. Its
content policy lets it load nothing from elsewhere and run nothing but its own script, named by its
hash. What it sends goes to the same addresses as everybody's requests, but for `/preview`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from importlib import resources

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Route

from chatbind_cli.errors import MediaError, contained
from chatbind_cli.evaluation.report.page import hash_source, part, render_preview
from chatbind_cli.evaluation.report.previews import preview_of
from chatbind_cli.media.modality import MODALITIES
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.sniff import sniff
from chatbind_cli.media.source import MediaSource

_NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_MOST_AT_ONCE = 2
"""Previews in the making: a film takes a core for seconds, and answers need it too."""


def page_routes(
    body: Callable[[Request], AbstractAsyncContextManager[bytes]],
    options: MediaOptions,
) -> list[BaseRoute]:
    """The routes of the page: `/`, which asks for a key where one is needed, and `/preview`.

    Args:
        body: reads a request's body, as far as the server's limits let it, and has room for it
            until the end. A `ChatBindError` of it, or of a medium, is the app's to tell.
        options: how media are read, so that one sees what the model is given.
    """
    limiter = CapacityLimiter(_MOST_AT_ONCE)
    text, policy = _page()

    async def page(request: Request) -> Response:
        return HTMLResponse(text, headers=_HEADERS | {"Content-Security-Policy": policy})

    async def preview(request: Request) -> Response:
        modality, name = (request.query_params.get(key, "") for key in ("modality", "name"))
        async with body(request) as data:
            text = await to_thread.run_sync(
                _preview, data, modality, name, options, limiter=limiter
            )
        return HTMLResponse(text, headers=_HEADERS | {"Content-Security-Policy": _NOTHING})

    return [Route("/", page), Route("/preview", preview, methods=["POST"])]


def _page() -> tuple[str, str]:
    """The page and its content policy."""
    # One look with the report: its colours, and its rules for media.
    style, script = part("base.css") + _text("page.css"), _text("page.js")
    policy = (
        f"{_NOTHING}; script-src {hash_source(script)}; style-src {hash_source(style)}; "
        "img-src data:; media-src data:; connect-src 'self'"
    )
    return _text("page.html").replace("{{ style }}", style).replace("{{ script }}", script), policy


def _text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _preview(data: bytes, modality: str, name: str, options: MediaOptions) -> str:
    """The medium as HTML, which says in `data-modality` what it was taken for.

    Raises:
        MediaError: it cannot be read as what it is said to be, or is of no kind that can be told.
    """
    source = MediaSource(name or "<bytes>", data=data)
    if not data:
        raise MediaError("is empty", where=source.name)
    if modality and modality not in MODALITIES:
        raise MediaError("can be seen as image, video, audio, depth, thermal or imu")
    try:
        modality = modality or sniff(source)
    except MediaError as error:
        raise MediaError(error.what, where=source.name, hint="choose what it is") from error
    try:
        preview = preview_of(source, modality, options)
    except Exception as error:
        failure = contained(error, where=source.name)
        raise MediaError(failure.what, where=source.name, hint=failure.hint) from error
    return render_preview(modality, source.name, preview)

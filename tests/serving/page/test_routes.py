"""The page and its previews, as any client gets them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlencode

import httpx
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from chatbind_cli.errors import ChatBindError
from chatbind_cli.evaluation.report.page import render_preview
from chatbind_cli.evaluation.report.previews import preview_of
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import open_source
from chatbind_cli.serving.page.routes import page_routes
from tests.evaluation import sample


@asynccontextmanager
async def _body(request: Request) -> AsyncIterator[bytes]:
    yield await request.body()


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, ChatBindError)
    return PlainTextResponse(str(error), 400)


async def _send(
    method: str, path: str, content: bytes = b"", options: MediaOptions | None = None
) -> httpx.Response:
    routes = page_routes(_body, options or MediaOptions())
    app = Starlette(routes=routes, exception_handlers={ChatBindError: _failed})
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        return await client.request(method, path, content=content)


def send(*words: object, **options: object) -> httpx.Response:
    return asyncio.run(_send(*words, **options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    sample.make_media(folder)
    return folder


def test_the_page_names_its_script_and_style_by_their_hashes_and_allows_no_other() -> None:
    reply = send("GET", "/")
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    for kind in ("script", "style"):
        (text,) = re.findall(f"<{kind}[^>]*>(.*?)</{kind}>", reply.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"\son\w+=|\sstyle=|https?://|@import", reply.text)


@pytest.mark.parametrize("modality", sample.FILES)
def test_a_preview_is_what_the_report_shows(media: Path, modality: str) -> None:
    path = media / sample.FILES[modality]
    reply = send("POST", f"/preview?modality={modality}&name={path.name}", path.read_bytes())
    expected = render_preview(modality, path.name, preview_of(open_source(path), modality))
    assert (reply.status_code, reply.text) == (200, expected)
    assert reply.headers["content-security-policy"].startswith("default-src 'none'")
    told = send("POST", f"/preview?name={path.name}", path.read_bytes())
    seen = "image" if modality == "thermal" else modality
    assert re.findall('data-modality="(.*?)"', told.text) == [seen]


def test_a_preview_is_read_with_the_options_that_the_model_has(tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", np.random.default_rng(0).normal(size=(6, 500)))
    data = (tmp_path / "m.npy").read_bytes()
    assert "does not say its sampling rate" in send("POST", "/preview", data).text
    reply = send("POST", "/preview", data, options=MediaOptions(imu_rate_hz=100))
    assert reply.text.count("<polyline") == 6


@pytest.mark.parametrize(
    ("query", "content", "line"),
    [
        ("name=a.png", b"", "a.png: is empty"),
        (
            "name=a.png",
            b"\x89PNG\r\n\x1a\n" + bytes(40),
            "a.png: is not a picture that can be read",
        ),
        ("", b"hello", "<bytes>: is of no kind that can be told; choose what it is"),
        ("modality=smell", b"hello", "can be seen as image, video, audio, depth, thermal or imu"),
        ("modality=video&name=a", b"hello", "a: "),
    ],
)
def test_what_cannot_be_shown_is_one_line(query: str, content: bytes, line: str) -> None:
    reply = send("POST", f"/preview?{query}", content)
    assert reply.status_code == 400
    assert reply.text.startswith(line)
    assert "\n" not in reply.text
    assert "--" not in reply.text, "no option of a command that nobody has called"


def test_a_name_is_text(media: Path) -> None:
    name = "<img src=x onerror=alert(1)>'\"" + "x" * 5000
    path = media / sample.FILES["image"]
    text = send("POST", f"/preview?{urlencode({'name': name})}", path.read_bytes()).text
    assert text.count("<img") == 1
    assert text.count("&lt;img src=x onerror=alert(1)&gt;") == 2
    assert len(re.sub('src="data:.*?"', "", text)) < 1500


def test_a_decoder_that_fails_in_a_way_of_its_own_is_one_line_too(
    media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("odd\ntables")

    monkeypatch.setattr("chatbind_cli.evaluation.report.previews.open_rgb", fail)
    reply = send("POST", "/preview?name=a.jpg", (media / "dog.jpg").read_bytes())
    assert (reply.status_code, reply.text) == (
        400,
        "a.jpg: cannot be used (RuntimeError: odd tables)",
    )

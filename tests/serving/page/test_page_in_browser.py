"""The page in a real browser, before a server that says what a test wants, as no model does.

What the page and the real server do together is in `test_real_page`.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from chatbind_cli.errors import ChatBindError
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.serving.page.routes import page_routes
from tests.evaluation import sample
from tests.serving.page.acts import answered, ask, attach
from tests.waiting import wait_until
from tests.web import CONTRAST, wait

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
NASTY = "<img src=x onerror='window.owned = 1'><script>window.owned = 2</script>\n**bold** & done"


class Stub:
    """A server that answers with what a test wants, and remembers what it was asked."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.delay_s = 0.0
        self.key = ""
        self.problem: tuple[int, str] | None = None
        self.end = "data: [DONE]\n\n"
        self.bodies: list[dict[str, Any]] = []
        self.left = 0
        routes = [
            *page_routes(_body, MediaOptions()),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        handlers: Any = {ChatBindError: self._failed}
        self.app = Starlette(routes=routes, exception_handlers=handlers)

    async def _failed(self, request: Request, error: Exception) -> Response:
        return _error(400, str(error))

    async def _models(self, request: Request) -> Response:
        return self._refused(request) or JSONResponse({"data": [{"id": "toy"}]})

    def _refused(self, request: Request) -> Response | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return _error(401, "the API key is wrong")
        return None

    async def _chat(self, request: Request) -> Response:
        if (refused := self._refused(request)) is not None:
            return refused
        self.bodies.append(await request.json())
        if self.problem is not None:
            return _error(*self.problem)
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        try:
            for piece in self.pieces:
                await asyncio.sleep(self.delay_s)
                yield _event({"choices": [{"index": 0, "delta": {"content": piece}}]})
            yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            yield _event({"choices": [], "usage": {"completion_tokens": len(self.pieces)}})
            yield self.end
        except asyncio.CancelledError:
            self.left += 1
            raise


@asynccontextmanager
async def _body(request: Request) -> AsyncIterator[bytes]:
    yield await request.body()


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _error(status: int, line: str) -> Response:
    return JSONResponse({"error": {"message": line, "type": "x"}}, status)


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Stub, str]]:
    stub = Stub()
    server = uvicorn.Server(uvicorn.Config(stub.app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield stub, f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    sample.make_media(folder)
    return folder


@pytest.fixture
def stub(served: tuple[Stub, str]) -> Stub:
    stub = served[0]
    stub.pieces, stub.delay_s, stub.key, stub.problem = ["A ", "dog."], 0.0, "", None
    stub.end = "data: [DONE]\n\n"
    stub.bodies.clear()
    return stub


@pytest.fixture
def opened(browser: Any, stub: Stub, served: tuple[Stub, str]) -> Iterator[Any]:
    browser.get_log("browser")
    browser.get("about:blank")
    browser.get(served[1])
    wait(browser, "return document.getElementById('model').textContent === 'toy'")
    yield browser
    # of every test: nothing ran that should not, nothing was complained of, nothing left the house
    assert browser.execute_script("return window.owned") is None
    severe = [line["message"] for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    # what a test brings about itself
    own = ("the server responded with a status of 4", "net::ERR_INTERNET_DISCONNECTED")
    assert [line for line in severe if not any(words in line for words in own)] == []
    names = browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert all(name.startswith((served[1], "data:")) for name in names), names


def test_several_media_and_turns_go_together(opened: Any, stub: Stub, media: Path) -> None:
    attach(opened, media / "dog.jpg", media / "tone.wav")
    attach(opened, media / "walk.csv")
    wait(opened, "return document.querySelectorAll('#media figure').length === 3")
    opened.find_element("css selector", "button[aria-label='Remove walk.csv']").click()
    ask(opened, "First?")
    assert answered(opened) == "A dog."
    stub.pieces = ["Yes."]
    opened.execute_script("document.getElementById('temperature').value = '0'")
    ask(opened, "Second?")
    assert answered(opened, 2) == "Yes."
    first, second = stub.bodies
    assert [part.get("modality") for part in first["messages"][0]["content"]] == [
        None,
        "image",
        "audio",
    ]
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][0] == first["messages"][0]
    assert second["messages"][1]["content"] == "A dog."
    assert (first.get("temperature"), second["temperature"]) == (None, 0)
    assert (first["model"], first["stream"]) == ("toy", True)

    opened.find_element("id", "anew").click()
    assert opened.find_elements("css selector", "#turns article") == []
    ask(opened, "Third?")
    answered(opened)
    assert len(stub.bodies[-1]["messages"]) == 1


def test_the_end_stays_in_sight_unless_one_reads_above(
    opened: Any, stub: Stub, media: Path
) -> None:
    left = "const p = document.scrollingElement; return p.scrollHeight - p.scrollTop - innerHeight"
    stub.pieces, stub.delay_s = [f"line {n}\n" for n in range(100)], 0.01
    ask(opened, "Go on and on.")
    words = "document.querySelector('.answer .words').textContent"
    wait(opened, f"return {words}.includes('line 60')")
    wait(opened, left.replace("return ", "return 40 > "))
    opened.execute_script("document.scrollingElement.scrollTop = 0")
    answered(opened)
    assert opened.execute_script("return document.scrollingElement.scrollTop") == 0
    opened.execute_script("document.scrollingElement.scrollTop = 1e6")
    attach(opened, media / "room.png")  # what one adds covers nothing either
    wait(opened, "return document.querySelector('#media img')?.naturalWidth")
    wait(opened, left.replace("return ", "return 1 > "))


def test_what_a_model_and_a_file_say_stays_text(opened: Any, stub: Stub, tmp_path: Path) -> None:
    nasty = tmp_path / "<img src=x onerror='window.owned=3'>.jpg"
    nasty.write_bytes(b"\xff\xd8\xff no picture")
    attach(opened, nasty)
    wait(opened, "return document.querySelector('#media .failure')")
    assert nasty.name in opened.find_element("css selector", "#media .failure").text
    opened.find_element("class name", "remove").click()
    stub.pieces = [NASTY[:9], NASTY[9:30], NASTY[30:]]
    ask(opened, NASTY.replace("\n", " "))
    assert answered(opened) == NASTY
    assert opened.find_elements("css selector", "main img, main script") == []


def test_an_error_is_the_servers_line_and_the_question_comes_back(
    opened: Any, stub: Stub, media: Path
) -> None:
    stub.problem = (429, "30 requests wait already; try again in 2 s")
    attach(opened, media / "dog.jpg")
    wait(opened, "return document.querySelector('#media figure')")
    ask(opened, "What is it?")
    wait(opened, "return !document.getElementById('error').hidden")
    assert opened.find_element("id", "error").text == stub.problem[1]
    assert opened.find_element("id", "text").get_property("value") == "What is it?"
    assert opened.find_elements("css selector", "#turns article") == []
    stub.problem = None
    opened.find_element("id", "ask").click()
    assert answered(opened) == "A dog."
    assert not opened.find_element("id", "error").is_displayed()
    assert [len(body["messages"][0]["content"]) for body in stub.bodies] == [2, 2]


@pytest.mark.parametrize(
    ("end", "line"),
    [
        ('data: {"error": {"message": "the engine is gone"}}\n\n', "the engine is gone"),
        ("", "The answer broke off."),
    ],
)
def test_an_answer_that_breaks_off_stays_as_far_as_it_came(
    opened: Any, stub: Stub, end: str, line: str
) -> None:
    stub.end = end
    ask(opened, "What is it?")
    assert answered(opened) == "A dog."
    assert opened.find_element("id", "error").text == line
    assert "broken off" in opened.find_element("class name", "figures").text
    assert opened.find_element("id", "text").get_property("value") == ""


def test_a_server_that_is_not_there_costs_no_question(opened: Any) -> None:
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    opened.execute_cdp_cmd("Network.enable", {})
    opened.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    try:
        ask(opened, "What is it?")
        wait(opened, "return !document.getElementById('error').hidden")
    finally:
        opened.execute_cdp_cmd("Network.emulateNetworkConditions", offline | {"offline": False})
    assert opened.find_element("id", "error").text == "The server cannot be reached."
    opened.find_element("id", "ask").click()
    assert answered(opened) == "A dog."


def test_a_new_chat_ends_the_old_one(opened: Any, stub: Stub) -> None:
    stub.pieces, stub.delay_s, left = ["old "] * 400, 0.02, stub.left
    ask(opened, "Go on.")
    wait(opened, "return document.querySelector('.answer .words').textContent !== ''")
    opened.find_element("id", "anew").click()
    wait_until(lambda: stub.left > left)
    stub.pieces, stub.delay_s = ["new"], 0.0
    ask(opened, "And now?")
    assert answered(opened) == "new"
    assert len(stub.bodies[1]["messages"]) == 1
    time.sleep(0.1)
    assert opened.execute_script("return document.getElementById('turns').children.length") == 1


def test_a_key_that_holds_no_longer_is_asked_for_again(opened: Any, stub: Stub) -> None:
    stub.key = "another"
    ask(opened, "And now?")
    wait(opened, "return document.getElementById('secret').checkVisibility()")
    opened.find_element("id", "secret").send_keys("another\n")
    assert answered(opened) == "A dog.", "the question has waited"
    opened.execute_script("sessionStorage.clear()")


def test_a_phone_shows_it_without_scrolling_sideways(
    browser: Any, stub: Stub, served: tuple[Stub, str], media: Path
) -> None:
    size = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.get(served[1])
        width = "return document.scrollingElement.scrollWidth"
        assert browser.execute_script(width) <= 360
        attach(browser, *(media / name for name in sample.FILES.values()))
        wait(browser, "return document.querySelectorAll('#media figure').length === 6")
        assert browser.execute_script(width) <= 360
        stub.pieces = ["word" * 300]
        ask(browser, "What is all this, " + "x" * 200)
        answered(browser)
        assert browser.execute_script(width) <= 360
        browser.find_element("css selector", "#settings summary").click()
        assert browser.execute_script(width) <= 360
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_and_used_by_all(opened: Any, stub: Stub, media: Path, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        attach(opened, media / "room.png", media / "walk.csv")
        wait(opened, "return document.querySelectorAll('#media figure').length === 2")
        ask(opened, "What is it?")
        answered(opened)
        attach(opened, media / "tone.wav")
        wait(opened, "return document.querySelector('#media figure')")
        opened.execute_script(
            "document.getElementById('key').hidden = false;"
            "document.getElementById('settings').open = true;"
        )
        ratio, where = opened.execute_script(CONTRAST)
        assert ratio >= 4.5, where  # WCAG 2.2, 1.4.3
        tree = opened.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    wanted = {"combobox", "textbox", "button", "spinbutton", "image", "Audio", "log", "form"}
    roles = set()
    for node in tree:
        role = node.get("role", {}).get("value")
        if not node["ignored"] and role in wanted:
            roles.add(role)
            assert node.get("name", {}).get("value"), node
    assert roles == wanted


def test_the_keyboard_is_enough(opened: Any, stub: Stub, media: Path) -> None:
    attach(opened, media / "dog.jpg")
    wait(opened, "return document.querySelector('#media figure')")
    focused = "return document.activeElement.id || document.activeElement.className"
    assert opened.execute_script(focused) == "text", "one can type at once"
    seen = []
    for _ in range(8):
        webdriver.ActionChains(opened).send_keys(webdriver.Keys.TAB).perform()
        seen.append(opened.execute_script(focused))
    assert {"files", "ask"} <= set(seen)
    field = opened.find_element("id", "text")
    field.click()
    shift = webdriver.ActionChains(opened).key_down(webdriver.Keys.SHIFT)
    shift.send_keys(webdriver.Keys.ENTER).key_up(webdriver.Keys.SHIFT).send_keys("x").perform()
    assert field.get_property("value") == "\nx"
    stub.pieces, stub.delay_s = ["a "] * 400, 0.02
    webdriver.ActionChains(opened).send_keys(webdriver.Keys.ENTER).perform()
    wait(opened, "return document.querySelector('.answer .words')?.textContent.startsWith('a ')")
    webdriver.ActionChains(opened).send_keys(webdriver.Keys.ESCAPE).perform()
    assert len(answered(opened)) < 600
    assert opened.execute_script(focused) == "text"

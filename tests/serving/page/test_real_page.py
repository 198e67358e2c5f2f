"""The page, the real server behind it and a small model, in a real browser."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chatbind_cli.inference.answerer import Answerer
from tests.serving.conftest import Running, serving
from tests.serving.page.acts import answered, ask, attach, drop
from tests.waiting import wait_until
from tests.web import wait

SHOWS = {
    "image": "img:not(.false)",
    "depth": "img.false + .legend .turbo",
    "thermal": "img.false + .legend .inferno",
    "audio": "audio",
    "video": "video",
    "imu": "svg.curves",
}


def _open(browser: Any, url: str) -> None:
    browser.get_log("browser")
    browser.get("about:blank")
    browser.get(url)


@pytest.fixture
def opened(browser: Any, running: Running) -> Iterator[Any]:
    _open(browser, running.url)
    wait(browser, "return document.getElementById('model').textContent === 'model'")
    browser.execute_script("document.getElementById('temperature').value = '0'")
    yield browser
    severe = [line["message"] for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert [line for line in severe if "the server responded with a status of 4" not in line] == []


def _told(running: Running, messages: list[Any], **more: Any) -> str:
    """What the API answers to the same question."""
    reply = running.client.chat.completions.create(
        model="model", messages=messages, temperature=0, **more
    )
    return str(reply.choices[0].message.content)


def _asked(text: str, *media: tuple[str, Path]) -> dict[str, Any]:
    parts: list[dict[str, str]] = [{"type": "text", "text": text}]
    for modality, path in media:
        url = f"data:;base64,{base64.b64encode(path.read_bytes()).decode()}"
        parts.append({"type": "media", "modality": modality, "url": url})
    return {"role": "user", "content": parts}


@pytest.mark.parametrize("modality", SHOWS)
def test_a_dropped_medium_of_each_modality_is_seen_and_asked_about(
    opened: Any, running: Running, media: dict[str, Path], modality: str
) -> None:
    drop(opened, media[modality])
    assert not opened.find_element("id", "drop").is_displayed(), "what said where to drop is gone"
    told = "image" if modality == "thermal" else modality
    wait(opened, f"return document.querySelector('#media select').value === '{told}'")
    if modality == "thermal":  # looks like any grey picture: a person says it
        opened.find_element("css selector", "#media option[value=thermal]").click()
    shown = f"document.querySelector('#media [data-modality=\"{modality}\"]')"
    wait(opened, f"return {shown} !== null")
    assert opened.execute_script(f"return {shown}.querySelector('{SHOWS[modality]}') !== null")
    if modality in ("audio", "video"):
        assert wait(opened, f"return {shown}.querySelector('{modality}').duration") > 0.2
    ask(opened, "What about the dog?")
    answer = answered(opened)
    asked = _asked("What about the dog?", (modality, media[modality]))
    assert answer == _told(running, [asked])
    assert answer != _told(running, [_asked("What about the dog?")])
    kept = f'#turns .asked [data-modality="{modality}"]'
    assert opened.find_elements("css selector", kept), "it stays beside its question"
    assert opened.find_elements("css selector", "#media li") == []


def test_several_media_and_turns_are_answered_as_the_api_answers_them(
    opened: Any, running: Running, media: dict[str, Path]
) -> None:
    attach(opened, media["image"], media["audio"])
    wait(opened, "return document.querySelectorAll('#media figure').length === 2")
    ask(opened, "First?")
    first = answered(opened)
    attach(opened, media["imu"])
    wait(opened, "return document.querySelectorAll('#media figure').length === 1")
    opened.execute_script("document.getElementById('most').value = '5'")
    ask(opened, "Second?")
    second = answered(opened, 2)
    said = [_asked("First?", ("image", media["image"]), ("audio", media["audio"]))]
    assert first == _told(running, said)
    said += [{"role": "assistant", "content": first}, _asked("Second?", ("imu", media["imu"]))]
    assert second == _told(running, said, max_tokens=5)
    figures = opened.find_elements("class name", "figures")[1].text
    assert figures.endswith("5 tokens · cut off at the most tokens")


def test_an_answer_comes_in_pieces_and_the_server_hears_when_it_is_stopped(
    opened: Any, running: Running
) -> None:
    opened.execute_script(
        "window.seen = new Set(); new MutationObserver(() => window.seen.add("
        "document.querySelector('.answer .words')?.textContent.length))"
        ".observe(document.getElementById('turns'), {childList: true, subtree: true})"
    )
    opened.execute_script("document.getElementById('most').value = '400'")
    ask(opened, "What about the dog?")
    wait(opened, "return document.querySelector('.answer .words').textContent !== ''")
    opened.find_element("id", "stop").click()
    answer = answered(opened)
    wait_until(lambda: running.desk.waiting + running.desk.under_way == 0)
    assert "stopped" in opened.find_element("class name", "figures").text
    whole = _told(running, [_asked("What about the dog?")], max_tokens=400)
    assert whole.startswith(answer)
    assert 0 < len(answer) < len(whole)
    assert opened.execute_script("return window.seen.size") > 2


def test_an_error_is_the_servers_line_and_the_question_comes_back(
    opened: Any, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff no picture")
    attach(opened, broken)
    wait(opened, "return document.querySelector('#media .failure')")
    said = opened.find_element("css selector", "#media .failure").text
    assert said == "broken.jpg: is not a picture that can be read"
    ask(opened, "What is it?")
    wait(opened, "return !document.getElementById('error').hidden")
    assert "not a picture that can be read" in opened.find_element("id", "error").text
    assert opened.find_element("id", "text").get_property("value") == "What is it?"
    opened.find_element("class name", "remove").click()
    opened.find_element("id", "ask").click()
    assert answered(opened)
    assert not opened.find_element("id", "error").is_displayed()


def test_a_medium_beyond_the_servers_limit_says_so(
    browser: Any, answerer: Answerer, tmp_path: Path
) -> None:
    big = tmp_path / "big.png"
    big.write_bytes(bytes(3 << 20))
    with serving(answerer, body_bytes=2 << 20) as server:
        _open(browser, server.url)
        attach(browser, big)
        wait(browser, "return document.querySelector('#media .failure')")
        said = browser.find_element("css selector", "#media .failure").text
        assert said.startswith("the body is longer than 2 MiB")
        browser.get("about:blank")


def test_a_key_is_asked_for_where_one_is_wanted_and_kept_in_the_tab_alone(
    browser: Any, answerer: Answerer
) -> None:
    with serving(answerer, key="s3cret") as server:
        _open(browser, server.url)
        field = browser.find_element("id", "secret")
        wait(browser, "return document.getElementById('secret').checkVisibility()")
        field.send_keys("wrong\n")
        wait(browser, "return document.getElementById('refused').textContent")
        assert browser.find_element("id", "refused").text == "the API key is wrong"
        field.send_keys("s3cret\n")
        wait(browser, "return document.getElementById('model').textContent === 'model'")
        assert not field.is_displayed()
        ask(browser, "Hello?")
        assert answered(browser)
        stores = "[Object.values(sessionStorage), Object.values(localStorage), document.cookie]"
        assert browser.execute_script(f"return {stores}") == [["s3cret"], [], ""]
        browser.execute_script("sessionStorage.clear()")
        browser.get("about:blank")

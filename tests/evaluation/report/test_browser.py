"""The report in a real browser: headless Chromium, driven through its own driver."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from chatbind_cli.evaluation.report.page import render_report
from chatbind_cli.evaluation.report.previews import Previews
from chatbind_cli.media.root import MediaRoot
from tests.evaluation import sample
from tests.evaluation.sample import one_summary
from tests.web import CONTRAST, wait


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    sample.make_media(folder / "media")
    chunks = render_report(
        [one_summary(sample.reviews(), name="run")],
        questions=sample.questions(),
        answers=sample.answers(),
        previews=Previews(MediaRoot(folder / "media")),
    )
    path = folder / "report.html"
    path.write_text("".join(chunks), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def opened(browser: Any, page: str) -> Any:
    browser.get("about:blank")  # else only the part after # would change
    browser.get_log("browser")  # what other tests' pages have complained of
    browser.get(page)
    return browser


def _shown(browser: Any) -> list[str]:
    return list(
        browser.execute_script(
            "return [...document.querySelectorAll('details.entry')]"
            ".filter((node) => node.checkVisibility()).map((node) => node.id)"
        )
    )


def _choose(browser: Any, name: str, value: str) -> None:
    browser.execute_script(
        "const field = document.getElementById('filter').elements[arguments[0]];"
        "if (field.type === 'checkbox') field.checked = arguments[1] === '1';"
        "else field.value = arguments[1];"
        "field.dispatchEvent(new Event('input', {bubbles: true}));",
        name,
        value,
    )


def _press(browser: Any, key: str) -> None:
    browser.switch_to.active_element.send_keys(key)


def test_no_script_of_an_answer_runs_and_nothing_is_complained_of(opened: Any) -> None:
    opened.execute_script("for (const n of document.querySelectorAll('details')) n.open = true")
    time.sleep(0.3)
    assert opened.execute_script("return window.owned") is None
    assert (
        opened.execute_script("return document.querySelectorAll('a[href^=javascript]').length") == 0
    )
    assert [line for line in opened.get_log("browser") if line["level"] == "SEVERE"] == []
    text = opened.execute_script("return document.getElementById('q-2').textContent")
    assert sample.NASTY in text


def test_even_markup_that_got_into_the_page_could_not_run(opened: Any) -> None:
    opened.execute_script(
        "document.body.insertAdjacentHTML('beforeend', arguments[0]);"
        "const s = document.createElement('script'); s.textContent = 'window.owned = 5';"
        "document.body.append(s);",
        sample.NASTY,
    )
    time.sleep(0.3)
    assert opened.execute_script("return window.owned") is None
    refused = [line["message"] for line in opened.get_log("browser")]
    assert any("Content Security Policy" in line for line in refused)


def test_nothing_is_fetched(opened: Any) -> None:
    opened.execute_script("for (const n of document.querySelectorAll('details')) n.open = true")
    time.sleep(0.2)
    names = opened.execute_script(
        "return performance.getEntriesByType('resource').map((e) => e.name)"
    )
    assert [name for name in names if not name.startswith("data:")] == []


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"category": "detail"}, ["q-1", "q-3", "q-5"]),
        ({"winner": "first"}, ["q-0", "q-4"]),
        ({"winner": "second"}, ["q-2"]),
        ({"winner": "tie", "category": "detail"}, ["q-1", "q-3"]),
        ({"winner": "failed"}, ["q-5"]),
        ({"modality": "audio"}, ["q-1"]),
        ({"differs": "1"}, ["q-3", "q-6"]),
        ({"text": "A CAT, says 4"}, ["q-4"]),
        ({"text": "<script>window.owned"}, [f"q-{i}" for i in range(7)]),
        ({"text": "no such words"}, []),
    ],
)
def test_filters_show_what_fits_and_are_in_the_address(
    opened: Any, page: str, filters: dict[str, str], expected: list[str]
) -> None:
    for name, value in filters.items():
        _choose(opened, name, value)
    names = list(filters)
    wait(opened, f"return {names}.every((name) => location.hash.includes(name + '='))")
    assert _shown(opened) == expected
    count = opened.execute_script("return document.getElementById('count').textContent")
    assert count == ("7 questions" if len(expected) == 7 else f"{len(expected)} of 7 questions")
    assert opened.execute_script("return document.getElementById('nothing').hidden") is bool(
        expected
    )

    address = opened.current_url
    opened.get("about:blank")
    opened.get(address)
    assert _shown(opened) == expected


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("second", [2, 1, 3, 6, 0, 4, 5]),
        ("first", [4, 0, 1, 3, 6, 2, 5]),
        ("wide", [4, 0, 2, 1, 3, 6, 5]),
    ],
)
def test_questions_are_sorted_by_how_far_the_scores_are_apart(
    opened: Any, by: str, expected: list[int]
) -> None:
    _choose(opened, "sort", by)
    wait(opened, f"return location.hash === '#?sort={by}'")
    assert _shown(opened) == [f"q-{i}" for i in expected], "what failed comes last"
    _press(opened, "j")
    assert opened.execute_script("return document.activeElement.closest('details').id") == (
        f"q-{expected[0]}"
    )
    _choose(opened, "sort", "")
    wait(opened, "return location.hash === ''")
    assert _shown(opened) == [f"q-{i}" for i in range(7)]


def test_all_come_back(opened: Any) -> None:
    _choose(opened, "text", "no such words")
    wait(opened, "return !document.getElementById('nothing').hidden")
    opened.find_element("id", "reset").click()
    assert len(_shown(opened)) == 7
    assert "#" not in opened.current_url


def test_a_link_opens_its_question_in_view(opened: Any, page: str) -> None:
    opened.get("about:blank")
    opened.get(f"{page}#q-4")
    box = wait(
        opened,
        "const n = document.getElementById('q-4'); const b = n.getBoundingClientRect();"
        "return n.open && b.top >= 0 && b.top < innerHeight && [b.top]",
    )
    assert box
    # a link wins over a filter that hides what it names
    _choose(opened, "winner", "failed")
    wait(opened, "return document.getElementById('q-0').hidden")
    opened.execute_script("location.hash = '#q-0'")
    wait(
        opened,
        "return document.getElementById('q-0').open && !document.getElementById('q-0').hidden",
    )


def test_a_chart_leads_to_its_questions(opened: Any) -> None:
    opened.find_element("css selector", "svg a[href='#?category=detail']").click()
    wait(opened, "return document.getElementById('q-0').hidden")
    assert _shown(opened) == ["q-1", "q-3", "q-5"]
    top = "return document.getElementById('questions').getBoundingClientRect().top / innerHeight"
    assert 0 <= opened.execute_script(top) < 1, "the questions came into view"
    opened.find_element("link text", "Where they differ").click()
    wait(opened, "return document.getElementById('q-1').hidden")
    assert _shown(opened) == ["q-3", "q-6"]


def test_an_address_that_is_no_link_of_ours_opens_the_page_all_the_same(
    opened: Any, page: str
) -> None:
    opened.get("about:blank")
    opened.get(f"{page}#%zz")
    assert len(_shown(opened)) == 7
    assert [line for line in opened.get_log("browser") if line["level"] == "SEVERE"] == []


def test_it_can_be_read_with_the_keyboard_alone(opened: Any) -> None:
    def focused() -> Any:
        return opened.execute_script("return document.activeElement.closest('details')?.id")

    _press(opened, "j")
    assert focused() == "q-0"
    _press(opened, "j")
    _press(opened, "j")
    _press(opened, "k")
    assert focused() == "q-1"
    _press(opened, "o")
    assert opened.execute_script("return document.getElementById('q-1').open")
    _press(opened, "/")
    assert opened.execute_script("return document.activeElement.name") == "text"
    _press(opened, "jj 4")
    wait(opened, "return document.getElementById('count').textContent.startsWith('0 of')")
    _press(opened, "\ue00c")  # Escape leaves the field
    assert opened.execute_script("return document.activeElement.name") != "text"


def test_media_of_all_modalities_are_seen_and_heard(opened: Any) -> None:
    sources = "return [...document.querySelectorAll('img, audio, video')].map((n) => n.src)"
    assert set(opened.execute_script(sources)) == {""}, "loaded only when opened"
    opened.execute_script("for (const n of document.querySelectorAll('details')) n.open = true")
    for number, side in ((0, 80), (3, 80), (4, 80)):
        width = f"return document.querySelector('#q-{number} img').naturalWidth"
        assert wait(opened, width) == side
    for number, tag in ((1, "audio"), (2, "video")):
        node = f"document.querySelector('#q-{number} {tag}')"
        wait(opened, f"return {node}.readyState >= 1")
        assert opened.execute_script(f"return {node}.duration") == pytest.approx(1.0, abs=0.2)
    wait(opened, "return document.querySelector('#q-2 video').videoWidth === 640")
    curves = "return document.querySelectorAll('#q-5 polyline').length"
    assert opened.execute_script(curves) == 6
    gone = opened.execute_script("return document.querySelector('#q-6 figcaption').textContent")
    assert gone == "gone.jpg (cannot be shown: no such file)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_in_both_schemes(opened: Any, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    opened.execute_script("for (const n of document.querySelectorAll('details')) n.open = true")
    ratio, where = opened.execute_script(CONTRAST)
    assert ratio >= 4.5, where  # WCAG 2.2, 1.4.3
    paper = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") is (scheme == "light")
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_everything_that_one_uses_has_a_name_for_those_who_listen(opened: Any) -> None:
    opened.execute_script("for (const n of document.querySelectorAll('details')) n.open = true")
    opened.execute_cdp_cmd("Accessibility.enable", {})
    tree = opened.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    opened.execute_cdp_cmd("Accessibility.disable", {})
    wanted = {"combobox", "searchbox", "checkbox", "image", "Audio", "Video", "search", "link"}
    roles = set()
    for node in tree:
        role = node.get("role", {}).get("value")
        if not node["ignored"] and role in wanted:
            roles.add(role)
            assert node.get("name", {}).get("value"), node
    assert {"combobox", "searchbox", "checkbox", "image", "link"} <= roles


def test_a_phone_shows_it_without_scrolling_sideways(browser: Any, page: str) -> None:
    size = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.get("about:blank")
        browser.get(page)
        browser.execute_script(
            "for (const n of document.querySelectorAll('details')) n.open = true"
        )
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        table, cell = "document.querySelector('.scroll')", "document.querySelector('tbody th')"
        hidden = browser.execute_script(f"return {table}.scrollWidth - {table}.clientWidth")
        assert hidden > 50, "the table has more columns than a phone shows"
        browser.execute_script(f"{table}.scrollLeft = 1000")
        left = f"return {cell}.getBoundingClientRect().left - {table}.getBoundingClientRect().left"
        assert browser.execute_script(left) == 0, "each line keeps its name in sight"
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


SCROLL = """
const done = arguments[0], height = document.documentElement.scrollHeight;
let step = 0;
const go = () => {
  window.scrollTo(0, height * step / 40);
  if (++step <= 40) requestAnimationFrame(go); else done();
};
requestAnimationFrame(go);
"""


def test_five_thousand_reviews_open_scroll_and_can_be_searched(
    browser: Any, tmp_path: Path
) -> None:
    draw = random.Random(0)
    words = ["this", "answer", "is", "more", "precise", "than", "the", "other", "nobody", "can"]

    def text(n: int) -> str:
        return " ".join(draw.choices(words, k=n))

    reviews = []
    for i in range(2500):
        for order in ([1, 2], [2, 1]):
            metadata = {"order": order, "slot": f"{i} {order}", "models": ["a", "b"]}
            pair = [draw.randint(5, 9), draw.randint(4, 10)]
            reviews.append(
                {"question_id": i, "category": "conv", "tuple": pair, "content": text(100)}
                | {"reviewer_id": "judge", "metadata": metadata}
            )
    answers = {str(i): {"text": text(60)} for i in range(2500)}
    questions = {str(i): {"text": text(12)} for i in range(2500)}
    path = tmp_path / "big.html"
    with path.open("w") as file:
        file.writelines(
            render_report([one_summary(reviews)], questions=questions, answers=[answers, answers])
        )
    browser.get(path.as_uri())
    browser.execute_async_script(SCROLL)  # how fast: benchmarks/review.py
    _choose(browser, "text", "nobody can")
    wait(browser, "return document.getElementById('count').textContent.includes(' of ')", 30)

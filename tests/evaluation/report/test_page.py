"""The report in one HTML file: what is in it, and that nothing in it runs but its own script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from chatbind_cli.evaluation.contexts import Contexts
from chatbind_cli.evaluation.files import Mismatches
from chatbind_cli.evaluation.ranking import ranking_of
from chatbind_cli.evaluation.report.page import WIDTH, relative_chart, render_report
from chatbind_cli.evaluation.report.previews import Previews
from chatbind_cli.evaluation.summary import summarize
from chatbind_cli.media.root import MediaRoot
from tests.evaluation.sample import one_summary

NASTY = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'{{ 7*7 }}</details>"


class Page(HTMLParser):
    """Counts tags and attributes, and takes the text out."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.data: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.data.setdefault(self.open[-1] if self.open else "", []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def _review(question: int, pair: Any, **more: Any) -> dict[str, Any]:
    metadata = {"order": [1, 2], "modality": "image", **more.pop("metadata", {})}
    record = {"question_id": question, "category": "conv", "tuple": pair, "content": "8 6\nwhy"}
    return {**record, "reviewer_id": "judge", "metadata": metadata, **more}


REVIEWS = [
    _review(1, [8, 6]),
    _review(1, [6, 7], metadata={"order": [2, 1]}),
    _review(2, [5, 9], category="detail"),
    _review(2, [5, 9], category="detail", metadata={"order": [2, 1]}),
    _review(3, None, error="no reply", content=NASTY, category=NASTY),
]
QUESTIONS = {"1": {"question_id": 1, "text": NASTY, "image": "dog.jpg"}}
FAILED = {"text": "", "error": "no such picture"}
ANSWERS = [{"1": {"text": NASTY}, "3": FAILED}, {"1": {"text": "A cat."}, "2": {"text": "A dog."}}]


@pytest.fixture(scope="module")
def html() -> str:
    summaries = [one_summary(REVIEWS, name="run")]
    return "".join(render_report(summaries, questions=QUESTIONS, answers=ANSWERS))


def test_an_answer_that_failed_says_why(html: str) -> None:
    assert "no such picture" in html


def test_every_question_has_an_entry_with_its_winner_and_a_link(html: str) -> None:
    page = Page(html)
    entries = page.all("details")
    assert [(e["data-winner"], e["data-differs"]) for e in entries] == [
        ("first", "1"),
        ("second", "0"),
        ("failed", "0"),
    ]
    links = {attributes["href"] for attributes in page.all("a")}
    filters = {"#?category=conv", "#?category=detail", "#?differs=1"}
    assert links == {"#questions", "#q-1", "#q-2", "#q-3", *filters}
    assert [entry["id"] for entry in entries] == ["q-1", "q-2", "q-3"]
    for text in ("A cat.", "dog.jpg", "no reply", "9</span>", "second answer shown first", "judge"):
        assert text in html


def test_what_models_wrote_is_text_and_the_only_script_is_the_pages_own(html: str) -> None:
    page = Page(html)
    assert page.open == []
    assert len(page.all("script")) == 1
    assert page.all("img") == []
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "".join(page.data["div"]).count(NASTY) == 2
    assert NASTY in "".join(page.data["span"])
    assert page.all("details")[2]["data-category"] == NASTY


def test_what_counts_as_right_and_what_the_judge_read_stand_beside_the_answers(
    tmp_path: Path,
) -> None:
    questions = {
        "1": {"question_id": 1, "text": "?", "image": "COCO_val2014_dog.jpg", "answer": "a dog"},
        "2": {"question_id": 2, "text": "?", "audio": "a.wav"},
    }
    boxes = [{"category": "dog", "bbox": [1, 2, 3, 4]}]
    context = {"image": "dog.jpg", "captions": [f"A dog. {NASTY}"], "instances": boxes}
    (tmp_path / "c.jsonl").write_text(json.dumps(context))
    contexts = Contexts(tmp_path / "c.jsonl", Mismatches())
    options: dict[str, Any] = {"questions": questions, "contexts": contexts}
    summaries = [one_summary([_review(1, [8, 6]), _review(2, [8, 6])])]
    words = Page("".join(render_report(summaries, **options))).data["div"]
    assert [text for text in words if text.strip()] == [
        "a dog",
        f"A dog. {NASTY}\n\ndog: [1, 2, 3, 4]",
        "8 6\nwhy",
        "8 6\nwhy",
    ]
    given = {"2": {"text": "a bark"}}
    html = "".join(render_report(summaries, references=given, **options))
    assert "a bark" in html
    assert "a dog" not in html, "a file of references stands for all questions"


def test_lengths_stand_with_the_question_as_reviews_say_or_as_the_answers_are() -> None:
    reviews = [_review(1, [8, 6], metadata={"lengths": [120, 45]}), _review(2, [8, 6])]
    answers = [{"2": {"text": "four"}}, {"2": {"text": "fivefive"}}]
    html = "".join(render_report([one_summary(reviews)], answers=answers))
    assert "answers of 120 and 45 characters" in html
    assert "answers of 4 and 8 characters" in html
    alone = "".join(render_report([one_summary(reviews)], answers=answers[:1]))
    assert "answers of 4 characters" in alone


def _pairs(*pairs: str) -> list[dict[str, Any]]:
    """Reviews of pairs such as `ab`, in which the later letter wins two of three questions."""
    return [
        _review(n, [5, 8] if n else [8, 5], metadata={"models": list(pair), "pair": list(pair)})
        for pair in pairs
        for n in range(3)
    ]


def test_all_models_are_ranked_in_a_table_with_intervals() -> None:
    summaries = summarize(_pairs("ab", "ac", "bc"), name="r", with_words=True)
    page = Page("".join(render_report(summaries, ranking=ranking_of(summaries))))
    assert page.open == []
    names = [text for text in page.data["th"] if re.match(r"\d\. ", text)]
    assert names == ["1. c", "2. b", "3. a"]
    ends = [text for text in page.data["td"] if re.fullmatch(r"[\d.]{4,} to [\d.]{4,}", text)]
    assert len(ends) >= 3
    assert "Ranking" not in page.data["h2"][1:]


def test_answers_that_were_graded_alone_have_one_score_and_no_other_side() -> None:
    reviews = [
        _review(n, [7 + n], metadata={"models": [model], "pair": [pair], "lengths": [30]})
        for pair, model in enumerate("ab", start=1)
        for n in range(2)
    ]
    for review in reviews:
        del review["metadata"]["order"]
    summaries = summarize(reviews, name="r", with_words=True)
    answers = [{"0": {"text": "Said by a."}}, {"0": {"text": "Said by b."}}]
    html = "".join(render_report(summaries, answers=answers, ranking=ranking_of(summaries)))
    page = Page(html)
    assert page.open == []
    assert [(e["data-winner"], e["data-gap"]) for e in page.all("details")] == (
        [("graded", "7.0"), ("graded", "8.0")] * 2
    )
    assert "None" not in html
    for gone in ("second", "First answer", "tie"):
        assert gone not in "".join(page.data["h3"] + page.data["summary"] + page.data["dt"])
    assert "answer of 30 characters" in html
    assert html.index("Said by a.") < html.index("Said by b.")
    assert page.data["strong"][0] == "7.5"


def test_the_policy_names_the_script_and_the_style_by_their_hashes(html: str) -> None:
    (policy,) = [meta["content"] for meta in Page(html).all("meta") if "http-equiv" in meta]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    for kind in ("script", "style"):
        (text,) = re.findall(f"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert " style=" not in html


def test_nothing_is_fetched_from_anywhere(html: str) -> None:
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", html)
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html


def test_the_charts_show_the_figures(html: str) -> None:
    summary = one_summary(REVIEWS)
    titles = Page(html).data["title"]
    assert any(title.startswith("conv: 92.9 %") for title in titles)
    assert any(title.startswith(f"all: {summary.total['relative']} %") for title in titles)
    assert "first 7, second 6.5: 1 question" in titles
    assert "first 5, second 9: 1 question" in titles


def test_what_one_wants_to_know_first_stands_on_top_with_its_failures(html: str) -> None:
    page = Page(html)
    assert page.data["dt"] == [
        "relative score",
        "second better : tie : first better",
        "same winner in both orders",
        "failed",
    ]
    assert page.data["strong"] == ["129.2 %", "1 : 0 : 1", "50.0 %", "1"]
    assert 'class="bad"><dt>failed' in html
    bars = [text for text in page.data["title"] if "first better" in text]
    assert bars[-1] == "all: second better 1, tie 0, first better 1"


def test_accuracy_comes_first_and_what_was_left_out_is_said() -> None:
    rule = [
        _review(n, [10, 1], reviewer_id="rule", metadata={"correct": [True, n > 1]})
        for n in range(4)
    ]
    page = Page("".join(render_report([one_summary(rule)])))
    assert page.data["dt"][0] == "accuracy"
    assert page.data["strong"][0] == "100.0 % / 50.0 %"
    said = "".join(Page("".join(render_report([one_summary(REVIEWS[:3], name="r")]))).data["p"])
    assert "r: the means are of 1 of 2 questions; left out, as judged in one order only: 1" in said


def test_charts_of_several_runs_lead_to_the_questions_of_their_own() -> None:
    runs = [one_summary(REVIEWS, name=name) for name in ("a & b", "c")]
    page = Page("".join(render_report(runs)))
    links = {attributes["href"] for attributes in page.all("a")}
    assert {"#?run=a%20%26%20b&category=detail", "#?run=c&differs=1"} < links


@pytest.mark.parametrize(
    ("models", "title"),
    [
        ([("ref", "x")], "x against ref"),
        ([("ref", "x"), ("ref", "y")], "x, y against ref"),
        ([("ref", "x"), ("other", "y")], "Review"),
        ([("", "")], "Review"),
    ],
)
def test_the_title_says_who_is_compared(models: list[tuple[str, str]], title: str) -> None:
    runs = [one_summary([_review(1, [8, 6], metadata={"models": list(pair)})]) for pair in models]
    page = Page("".join(render_report(runs)))
    assert page.data["h1"] == [title]


def test_questions_on_which_judges_disagree_are_marked_and_can_be_filtered() -> None:
    ours = [_review(1, [8, 6]), _review(2, [8, 6])]
    theirs = [_review(1, [9, 5], reviewer_id="b"), _review(2, [5, 6], reviewer_id="b")]
    page = Page("".join(render_report([one_summary([*ours, *theirs])])))
    assert [entry["data-judges"] for entry in page.all("details")] == ["0", "1"]
    assert [field["name"] for field in page.all("input")] == ["text", "differs", "judges"]
    alone = Page("".join(render_report([one_summary(ours)])))
    assert [field["name"] for field in alone.all("input")] == ["text", "differs"]


def test_a_thousand_reasons_to_fail_are_not_all_on_top() -> None:
    reviews = [_review(i, None, error=f"odd reply {i}") for i in range(1000)]
    html = "".join(render_report([one_summary(reviews)]))
    assert html.count("1 failed, in no mean: odd reply") == 8
    assert html.count("failed: odd reply") == 1000, "each at its question"
    assert "992 more failed, in no mean, for other reasons" in html


def test_entries_follow_the_questions_and_verdicts_the_judge_and_the_order() -> None:
    questions = {str(i): {"question_id": i, "text": f"q {i}"} for i in (3, 1, 2)}
    given = [_review(i, [8, 6], metadata={"order": [1, 2]}) for i in (1, 2, 3)]
    swapped = [_review(i, [8, 6], metadata={"order": [2, 1]}) for i in (2, 1, 3)]
    html = "".join(render_report([one_summary([*swapped, *given])], questions=questions))
    assert re.findall(r'id="(q-\d)"', html) == ["q-3", "q-1", "q-2"]
    orders = re.findall(r">judge(, second answer shown first)?", html[html.index('id="q-3"') :])
    assert orders == ["", ", second answer shown first"] * 3


def test_a_question_about_two_modalities_shows_both() -> None:
    question = {"question_id": 1, "text": "?", "image": ["a.jpg", "b.jpg"], "audio": "c.wav"}
    html = "".join(render_report([one_summary([_review(1, [8, 6])])], questions={"1": question}))
    assert [
        text for text in Page(html).data["figcaption"] if text.startswith(("a.", "b.", "c."))
    ] == [
        "a.jpg",
        "b.jpg",
        "c.wav",
    ]


@pytest.mark.parametrize("relative", [[3, 2.9], [1, 9.9], [9.9, 0.1], [5, 5]])
def test_the_axis_of_relative_scores_holds_every_mark_and_the_even_line(
    relative: list[float],
) -> None:
    chart = relative_chart(one_summary([_review(i, relative) for i in range(3)]).rows)
    assert chart is not None
    values = [100.0, *(value for _, marks in chart.lines for _, value, _ in marks)]
    places = [chart.place(value) for value in values]
    assert all(0 <= place <= WIDTH for place in places)
    assert 2 <= len(chart.ticks) <= 9
    assert (chart.place(chart.ticks[0]), chart.place(chart.ticks[-1])) == (0, WIDTH)


def test_a_report_without_any_score_still_comes(html: str) -> None:
    page = Page("".join(render_report([one_summary([_review(1, None, error="x")])])))
    assert page.open == []
    assert page.all("svg") == []


def test_a_question_about_nothing_but_text_shows_no_media(tmp_path: Path) -> None:
    review = {"question_id": 1, "score": [8, 6], "text": "8 6", "reviewer_id": "gpt-4"}
    questions = {"1": {"question_id": 1, "text": "How do I save time?", "category": "generic"}}
    previews = Previews(MediaRoot(tmp_path))
    chunks = render_report([one_summary([review])], questions=questions, previews=previews)
    page = Page("".join(chunks))
    assert [figure for figure in page.all("figure") if figure.get("class") == "preview"] == []
    assert previews.problems == []
    # Vicuna's reviews leave the category to the questions.
    assert [entry["data-category"] for entry in page.all("details")] == ["generic"]

"""Matching questions, answers, contexts and references by id."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from chatbind_cli.evaluation.cases import Inputs, digest
from chatbind_cli.evaluation.files import distinct_names
from chatbind_cli.jsonl import Line


def _write(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _answers(path: Path, ids: Sequence[object], word: str) -> Path:
    return _write(path, [{"question_id": i, "text": f"{word} {i}"} for i in ids])


def _questions(path: Path, ids: Sequence[object]) -> Path:
    return _write(path, [{"question_id": i, "text": f"q{i}", "category": "conv"} for i in ids])


def _inputs(tmp_path: Path, questions: list[Any], a: list[Any], b: list[Any]) -> Inputs:
    return Inputs(
        _questions(tmp_path / "q.jsonl", questions),
        [_answers(tmp_path / "a.jsonl", a, "a"), _answers(tmp_path / "b.jsonl", b, "b")],
    )


def test_answers_are_matched_by_id_and_never_by_line(tmp_path: Path) -> None:
    inputs = _inputs(tmp_path, [1, 2, 3], [3, 1, 2], [2, 3, 1])
    assert [(case.question_id, case.texts) for case in inputs.cases()] == [
        (1, ("a 1", "b 1")),
        (2, ("a 2", "b 2")),
        (3, ("a 3", "b 3")),
    ]
    assert inputs.remarks == []


def test_an_id_as_text_and_as_number_is_the_same_id(tmp_path: Path) -> None:
    inputs = _inputs(tmp_path, [1], ["1"], [1])
    assert [case.texts for case in inputs.cases()] == [("a 1", "b 1")]


def test_a_missing_answer_is_a_case_with_a_problem(tmp_path: Path) -> None:
    cases = list(_inputs(tmp_path, [1, 2], [1], []).cases())
    assert [case.problem for case in cases] == [
        f"no answer in {tmp_path}/b.jsonl",
        f"no answer in {tmp_path}/a.jsonl; no answer in {tmp_path}/b.jsonl",
    ]


def test_doubled_and_unasked_answers_are_remarked(tmp_path: Path) -> None:
    inputs = _inputs(tmp_path, [1], [1, 1], [1, 7, 8])
    assert [case.problem for case in inputs.cases()] == [None]
    assert inputs.remarks == [
        f"{tmp_path}/a.jsonl: more than once, the first one counts: question 1",
        f"{tmp_path}/b.jsonl: answers what was not asked: question 7, 8",
    ]


def test_whatever_does_not_fit_is_listed_by_file_in_a_line_a_kind(tmp_path: Path) -> None:
    questions = [{"question_id": i, "text": "q", "image": f"{i}.jpg"} for i in range(2000)]
    wrong = [{"question_id": 0, "error": "x"}, {"question_id": 1, "error": "x"}]
    wrong += [{"question_id": 2, "text": None}, *({"question_id": 3, "text": "b"},) * 3]
    inputs = Inputs(
        _write(tmp_path / "q.jsonl", questions),
        [
            _answers(tmp_path / "a.jsonl", [*range(2000), *range(1999)], "a"),
            _write(tmp_path / "b.jsonl", wrong),
        ],
        contexts=_write(tmp_path / "c.jsonl", [{"image": "x.jpg", "captions": ["z"]}]),
    )
    assert len(list(inputs.cases())) == 2000
    a, b = f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"
    assert inputs.remarks == [
        f"{a}: more than once, the first one counts: question 0, 1, 2, 3, 4, 5, 6, 7, ... "
        "(1,999 in all)",
        f"{b}: more than once, the first one counts: question 3",
        f"{b}: a failed answer to question 0, 1",
        f"{b}: no text in the answer to question 2",
        f"{tmp_path}/c.jsonl: no context for question 3",
        f"{b}: no answer to question 4, 5, 6, 7, 8, 9, 10, 11, ... (1,996 in all)",
    ]


def test_who_left_a_question_out_is_called_as_in_the_others(tmp_path: Path) -> None:
    inputs = _inputs(tmp_path, [1, 2], [1, 2], [2])
    assert [case.models for case in inputs.cases()] == [("a", "b"), ("a", "b")]


def test_a_failed_answer_of_vqa_is_a_problem_and_no_text(tmp_path: Path) -> None:
    failed = _write(tmp_path / "b.jsonl", [{"question_id": 1, "error": "no such file"}])
    inputs = Inputs(
        _questions(tmp_path / "q.jsonl", [1]), [_answers(tmp_path / "a.jsonl", [1], "a"), failed]
    )
    (case,) = inputs.cases()
    assert case.problem == f"the answer in {failed} failed (no such file)"


def test_streamed_answers_give_a_case_as_soon_as_they_come(tmp_path: Path) -> None:
    taken: list[int] = []

    def stream() -> Any:
        for number in (2, 9, 2, 1):
            taken.append(number)
            yield Line({"question_id": number, "text": f"b {number}"}, "<stdin>:1", 1)

    inputs = Inputs(
        _questions(tmp_path / "q.jsonl", [1, 2, 3]),
        [_answers(tmp_path / "a.jsonl", [1, 2, 3], "a"), stream()],
    )
    cases = inputs.cases()
    first = next(cases)
    assert (first.question_id, first.texts, taken) == (2, ("a 2", "b 2"), [2])
    rest = list(cases)
    assert [(case.question_id, case.problem) for case in rest] == [
        (1, None),
        (3, "no answer in stdin"),
    ]
    assert inputs.remarks == [
        "stdin: more than once, the first one counts: question 2",
        "stdin: no answer to question 3",
        "stdin: answers what was not asked: question 9",
    ]


def test_answers_that_are_judged_alone_are_a_case_each(tmp_path: Path) -> None:
    questions = _questions(tmp_path / "q.jsonl", [1, 2])
    with questions.open("a") as file:
        file.write("nonsense\n")
    sides = [_answers(tmp_path / "a.jsonl", [1, 2], "a"), _answers(tmp_path / "b.jsonl", [2], "b")]
    cases = list(Inputs(questions, sides, compared="single").cases())
    assert [(case.question_id, case.texts, case.models, case.pair) for case in cases] == [
        (1, ("a 1",), ("a",), (1,)),
        (1, (), ("b",), (2,)),
        (2, ("a 2",), ("a",), (1,)),
        (2, ("b 2",), ("b",), (2,)),
        (None, (), (), None),
    ]
    assert all(case.single for case in cases)
    (case,) = list(Inputs(questions, sides[:1], compared="single").cases())[:1]
    assert (case.models, case.pair) == (("a",), (1,)), "as it will be when others are added"


def test_a_streamed_answer_gives_all_pairs_of_its_question(tmp_path: Path) -> None:
    stream = iter([Line({"question_id": 2, "text": "b 2"}, "<stdin>:1", 1)])
    sides = [_answers(tmp_path / f"{word}.jsonl", [1, 2], word) for word in "ac"]
    inputs = Inputs(
        _questions(tmp_path / "q.jsonl", [1, 2]), [sides[0], stream, sides[1]], compared="all"
    )
    assert [(case.question_id, case.pair, case.texts) for case in inputs.cases()] == [
        (2, (1, 2), ("a 2", "b 2")),
        (2, (1, 3), ("a 2", "c 2")),
        (2, (2, 3), ("b 2", "c 2")),
        (1, (1, 2), ()),
        (1, (1, 3), ("a 1", "c 1")),
        (1, (2, 3), ()),
    ]


def test_contexts_are_found_under_every_spelling_of_the_picture(tmp_path: Path) -> None:
    names = ["000000000001.jpg", "COCO_val2014_000000000001.jpg", "000000000001"]
    questions = [{"question_id": i, "text": "q", "image": name} for i, name in enumerate(names)]
    answers = _answers(tmp_path / "a.jsonl", range(3), "a")
    context = {"id": "000000000001", "image": "000000000001.jpg", "captions": ["a dog"]}
    inputs = Inputs(
        _write(tmp_path / "q.jsonl", questions),
        [answers, answers],
        contexts=_write(tmp_path / "c.jsonl", [context]),
    )
    assert [case.context for case in inputs.cases()] == [context] * 3


def test_a_missing_context_is_a_problem_but_a_text_question_needs_none(tmp_path: Path) -> None:
    questions = [{"question_id": 0, "text": "q", "audio": "x.wav"}, {"question_id": 1, "text": "q"}]
    answers = _answers(tmp_path / "a.jsonl", [0, 1], "a")
    inputs = Inputs(
        _write(tmp_path / "q.jsonl", questions),
        [answers, answers],
        contexts=_write(tmp_path / "c.jsonl", [{"audio": "y.wav", "captions": ["z"]}]),
    )
    assert [case.problem for case in inputs.cases()] == ["no context for audio x.wav", None]
    assert [case.modality for case in inputs.cases()] == ["audio", None]


def test_the_right_answer_comes_from_the_file_then_the_question_then_an_answer_that_carries_it(
    tmp_path: Path,
) -> None:
    questions = [
        {"question_id": 0, "text": "q", "reference": ["x", "y"], "answer": "no"},
        {"question_id": 1, "text": "q", "answer": 3},
        {"question_id": 2, "text": "q", "answers": [{"answer": "net"}, {"answer": "net"}]},
        {"question_id": 3, "text": "q", "label": True},
        {"question_id": 4, "text": "q", "answer": " "},
        {"question_id": 5, "text": "q"},
    ]
    path = _write(tmp_path / "q.jsonl", questions)
    carried = [{"question_id": i, "text": "b", "answer": "z"} for i in range(6)]
    answers = _answers(tmp_path / "a.jsonl", range(6), "a")
    inputs = Inputs(path, [answers, _write(tmp_path / "b.jsonl", carried)])
    expected = [("x", "y"), ("3",), ("net",), ("yes",), ("z",), ("z",)]
    assert [case.references for case in inputs.cases()] == expected
    inputs = Inputs(path, [answers, answers])
    assert [case.references for case in inputs.cases()] == [*expected[:4], (), ()]
    references = _write(tmp_path / "r.jsonl", [{"question_id": 2, "text": "right", "answer": "x"}])
    inputs = Inputs(path, [answers, answers], references=references)
    assert [case.references for case in inputs.cases()] == [(), (), ("right",), (), (), ()]
    assert inputs.has_references()
    bare = _questions(tmp_path / "bare.jsonl", range(6))
    assert not Inputs(bare, [answers, answers]).has_references()
    assert Inputs(bare, [answers, tmp_path / "b.jsonl"]).has_references()


def test_lines_that_are_no_records_are_told_and_leave_the_others_alone(tmp_path: Path) -> None:
    questions = _questions(tmp_path / "q.jsonl", [1, 2])
    a = _answers(tmp_path / "a.jsonl", [1, 2], "a")
    bad = b'not json\n{"text": "x"}\n{"question_id": [3]}\n\xff\xfe\n{"question_id": NaN}\n[1]\n'
    for path in (questions, a):
        path.write_bytes(path.read_bytes() + bad)
    contexts = tmp_path / "c.jsonl"
    odd = '{"image": "x", "captions": 5}\n{"image": "x", "instances": [["dog"]]}\n'
    contexts.write_text('{"captions": ["of nothing"]}\n{\n' + odd)
    inputs = Inputs(questions, [a, a], contexts=contexts)
    cases = list(inputs.cases())
    assert [case.texts for case in cases[:2]] == [("a 1", "a 1"), ("a 2", "a 2")]
    assert [(case.question_id, case.line) for case in cases[2:]] == [(None, n) for n in range(3, 9)]
    assert cases[3].problem == f"{questions}:4: a record has no question_id or id"
    assert len(inputs.remarks) == 3
    assert inputs.remarks[1].startswith(f"{a}: cannot be used: line 3: is not JSON")
    assert "1: a context names no media, 2: is not JSON" in inputs.remarks[2]
    assert "3: its captions or instances are no list of such, 4: its" in inputs.remarks[2]


def test_a_line_that_vqa_could_not_read_is_no_answer_and_no_mismatch(tmp_path: Path) -> None:
    failed = {"line": 2, "error": "q.jsonl:2: is not JSON"}
    answers = _write(tmp_path / "a.jsonl", [{"question_id": 1, "text": "a"}, failed])
    inputs = Inputs(_questions(tmp_path / "q.jsonl", [1]), [answers, answers])
    assert [case.problem for case in inputs.cases()] == [None]
    assert inputs.remarks == []


def test_who_answered_is_the_record_s_word_or_the_file_s_name(tmp_path: Path) -> None:
    first = _write(tmp_path / "a.jsonl", [{"question_id": 1, "text": "x", "model_id": "m"}])
    second = _write(tmp_path / "b.jsonl", [{"question_id": 1, "text": "y"}])
    (case,) = Inputs(_questions(tmp_path / "q.jsonl", [1]), [first, second]).cases()
    assert case.models == ("m", "b")
    assert case.pair is None


def test_every_further_answer_file_makes_a_pair_with_the_first(tmp_path: Path) -> None:
    sides = [_answers(tmp_path / f"{word}.jsonl", [1, 2], word) for word in "abc"]
    cases = list(Inputs(_questions(tmp_path / "q.jsonl", [1, 2]), sides).cases())
    assert [(case.question_id, case.texts, case.models, case.pair) for case in cases] == [
        (1, ("a 1", "b 1"), ("a", "b"), (1, 2)),
        (1, ("a 1", "c 1"), ("a", "c"), (1, 3)),
        (2, ("a 2", "b 2"), ("a", "b"), (1, 2)),
        (2, ("a 2", "c 2"), ("a", "c"), (1, 3)),
    ]


def test_every_pair_of_answer_files_comes_once_and_a_gap_is_told_once(tmp_path: Path) -> None:
    questions = _questions(tmp_path / "q.jsonl", [1, 2])
    sides = [_answers(tmp_path / f"{word}.jsonl", [1, 2], word) for word in ("a", "b", "d")]
    sides.insert(2, _answers(tmp_path / "c.jsonl", [1], "c"))
    inputs = Inputs(questions, sides, compared="all")
    cases = list(inputs.cases())
    pairs = [(1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4)]
    assert [(case.question_id, case.pair) for case in cases] == [
        *((1, pair) for pair in pairs),
        *((2, pair) for pair in pairs),
    ]
    assert cases[4].texts == ("b 1", "d 1")
    assert cases[4].models == ("b", "d")
    gap = f"no answer in {tmp_path}/c.jsonl"
    assert [case.pair for case in cases if case.problem == gap] == [(1, 3), (2, 3), (3, 4)]
    assert inputs.remarks == [f"{tmp_path}/c.jsonl: no answer to question 2"]


def test_names_are_of_one_file_each_and_stay_when_files_are_added(tmp_path: Path) -> None:
    sides = []
    for name, model in (("x/a", None), ("y/a", None), ("b", "m"), ("c", "m"), ("m", None)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        record = {"question_id": 1, "text": "?", "model_id": model}
        sides.append(_write(tmp_path / f"{name}.jsonl", [record]))
    sides += [sides[3]] * 3
    questions = _questions(tmp_path / "q.jsonl", [1])
    expected = ["a", "y/a", "m", "m (c)", "m (m)", "m (c, 2)", "m (c, 3)", "m (c, 4)"]
    for n in range(2, len(sides) + 1):
        cases = list(Inputs(questions, sides[:n]).cases())
        assert [cases[0].models[0], *(case.models[1] for case in cases)] == expected[:n]


def test_of_several_files_those_of_one_model_are_told_apart_by_their_names(tmp_path: Path) -> None:
    sides = []
    for word, model in (("ref", "gpt"), ("step1", "m"), ("step2", "m")):
        record = {"question_id": 1, "text": word, "model_id": model}
        sides.append(_write(tmp_path / f"{word}.jsonl", [record]))
    cases = list(Inputs(_questions(tmp_path / "q.jsonl", [1]), sides).cases())
    assert [case.models for case in cases] == [("gpt", "m"), ("gpt", "m (step2)")]


def test_digests_follow_values_and_not_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest("a", "b") != digest("ab")
    assert digest({"a": "1"}) != digest({"a": 1})


def test_the_published_questions_contexts_and_answers_fit_together(shared_data: Path) -> None:
    folder = shared_data / "llava"
    answers = folder / "qa90_gpt4_answer.jsonl"
    inputs = Inputs(
        folder / "qa90_questions.jsonl",
        [answers, answers],
        contexts=folder / "caps_boxes_coco2014_val_80.jsonl",
    )
    cases = list(inputs.cases())
    assert len(cases) == 90
    assert {case.category for case in cases} == {"conv", "detail", "complex"}
    assert all(case.problem is None and case.context for case in cases)
    assert inputs.remarks == []


def test_contexts_belong_to_a_sense_and_a_number_is_no_picture(tmp_path: Path) -> None:
    questions = [
        {"question_id": 1, "text": "?", "audio": "dog.wav"},
        {"question_id": 2, "text": "?", "image": "2.jpg"},
        {"question_id": 3, "text": "?", "image": "scene.002"},
        {"question_id": 4, "text": "?", "image": "000000000009.jpg"},
    ]
    contexts = [
        {"image": "dog.jpg", "captions": ["a picture"]},
        {"id": 2, "image": "1.jpg", "captions": ["another"]},
        {"image": "scene.001", "captions": ["the first scene"]},
        {"id": "000000000009", "captions": ["found by its number"]},
        {"image": "dog.jpg", "captions": ["a picture again"]},
    ]
    answers = [{"question_id": n, "text": "a"} for n in (1, 2, 3, 4)]
    inputs = Inputs(
        _write(tmp_path / "q.jsonl", questions),
        [_write(tmp_path / "a.jsonl", answers), _write(tmp_path / "b.jsonl", answers)],
        contexts=_write(tmp_path / "c.jsonl", contexts),
    )
    found = [case.context and case.context["captions"][0] for case in inputs.cases()]
    assert found == [None, None, None, "found by its number"]
    assert any("more than once" in remark and "c.jsonl" in remark for remark in inputs.remarks)


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    questions = _write(tmp_path / "q.jsonl", [{"question_id": 1, "text": "?"}])
    sides = []
    for folder in ("x/run", "y/run"):
        (tmp_path / folder).mkdir(parents=True)
        answer = [{"question_id": 1, "text": folder, "model_id": "model"}]
        sides.append(_write(tmp_path / folder / "answers.jsonl", answer))
    (case,) = Inputs(questions, sides).cases()
    assert case.models == ("model", "model (y/run/answers)")


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["a.jsonl", "b.json.gz"], ["a", "b"]),
        (["x/a.jsonl", "a.jsonl"], ["x/a", "a"]),
        (["/r/1/m.jsonl", "/r/2/m.jsonl", "/r/2/n.jsonl"], ["1/m", "2/m", "n"]),
        (["a.json", "a.jsonl"], ["a.json", "a.jsonl"]),
        (["a.jsonl", "a.jsonl"], ["a", "a"]),
    ],
)
def test_names_of_files_are_as_short_as_they_can_be(files: list[str], names: list[str]) -> None:
    assert distinct_names(files) == names

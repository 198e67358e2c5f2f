"""The judge that needs no network."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from chatbind_cli.evaluation.cases import Case
from chatbind_cli.evaluation.judges.judge import RuleJudge
from tests.evaluation.sample import judgement


def test_the_rule_judge_needs_no_network_and_says_what_is_exact() -> None:
    case = Case(
        question={"question_id": 1, "text": "q"},
        answers=({"text": "It is a 7!"}, {"text": "It is the digit nine."}),
        references=("It is seven.",),
    )
    verdict = asyncio.run(RuleJudge().judge(judgement(case)))
    assert verdict.scores == (10.0, 1.0)
    assert verdict.metadata["correct"] == verdict.metadata["exact"] == [True, False]
    # F1 of {it, is, digit, 9} against {it, is, 7}: 2 * 2 / (4 + 3)
    assert verdict.metadata["f1"] == [1.0, round(4 / 7, 4)]
    assert verdict.content.splitlines()[0] == "10 1"


def test_the_rule_judge_judges_one_answer_too() -> None:
    case = Case(
        question={"question_id": 1}, answers=({"text": "9"},), references=("seven",), single=True
    )
    verdict = asyncio.run(RuleJudge().judge(judgement(case)))
    assert verdict.scores == (1.0,)
    assert verdict.metadata == {"correct": [False], "exact": [False], "f1": [0.0]}
    assert verdict.content.splitlines()[0] == "1"


def test_the_rule_judge_fails_without_a_reference() -> None:
    case = Case(question={"question_id": 1}, answers=({"text": "a"}, {"text": "b"}))
    verdict = asyncio.run(RuleJudge().judge(judgement(case)))
    assert verdict.scores is None
    assert verdict.error == "no reference answer to compare with"


def test_chosen_answers_are_the_right_choice_or_not() -> None:
    choices = [{"text": "dog", "logprob": -2.0}, {"text": "dog house", "logprob": -1.0}]
    case = Case(
        question={"question_id": 1},
        answers=({"text": "dog house", "choices": choices}, {"text": "A dog house."}),
        references=("dog",),
    )
    verdict = asyncio.run(RuleJudge().judge(judgement(case)))
    # whoever writes it may mean the dog; whoever chose it does not
    assert verdict.metadata["correct"] == [False, True]
    verdict = asyncio.run(RuleJudge().judge(judgement(replace(case, references=("1",)))))
    assert verdict.error == "the reference answer is none of the choices"

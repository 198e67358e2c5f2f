import pytest

from chatbind_cli.toy.digits import NAMES
from chatbind_cli.toy.texts import QUESTIONS, captions, question, spoken_of


@pytest.mark.parametrize("asked", QUESTIONS, ids=lambda asked: asked.kind)
def test_every_digit_has_an_answer_of_its_own(asked):
    answers = [asked.answer(digit) for digit in range(10)]
    assert len(set(answers)) == 10


def test_a_wording_belongs_to_one_question_only():
    wordings = [wording for asked in QUESTIONS for wording in asked.wordings]
    assert len(set(wordings)) == len(wordings)


def test_answers_are_right():
    assert question("which").answer(8) == "This is an eight."
    assert question("parity").answer(0) == "Zero is even."
    assert question("twice").answer(9) == "Twice nine is eighteen."
    assert question("after").answer(9) == "After nine comes ten."
    assert question("before").answer(0) == "Nothing comes before zero."
    assert question("before").answer(7) == "Before seven comes six."
    assert [question("larger").answer(d)[:2] for d in (4, 5)] == ["No", "Ye"]
    for digit in range(10):
        assert (digit % 2 == 1) == ("odd" in question("parity").answer(digit))
        assert question("figure").answer(digit) == f"It is written {digit}."


@pytest.mark.parametrize("digit", range(10))
def test_captions_and_mentions_name_no_other_digit(digit):
    others = [name for name in NAMES if name != NAMES[digit]]
    for text in (*captions(digit), *spoken_of(digit)):
        assert NAMES[digit] in text.lower() or str(digit) in text
        assert not any(name in text.lower().split() for name in others)
        assert not ("a eight" in text or "an seven" in text)

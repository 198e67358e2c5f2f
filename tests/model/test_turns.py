"""Where media go between the words."""

from __future__ import annotations

import pytest

from chatbind_cli.errors import RecordError
from chatbind_cli.media.medium import Medium
from chatbind_cli.model.turns import answer, place_media, question

DOG = Medium("image", "dog.jpg")
BARK = Medium("audio", "bark.wav")


def test_media_without_placeholder_follow_the_question_each_on_its_own_line() -> None:
    turn = question("What is it?", [DOG, BARK])
    assert turn.content == ("What is it?", "\n", DOG, "\n", BARK)
    assert turn.text == "What is it?\n<image>\n<audio>"


def test_placeholders_in_the_question_are_honoured_and_the_rest_follows() -> None:
    turn = question("Is <audio> from this? ", [DOG, BARK])
    assert turn.content == ("Is ", BARK, " from this? ", "\n", DOG)
    assert turn.media == (BARK, DOG)


def test_two_media_of_one_modality_keep_their_order() -> None:
    other = Medium("image", "cat.jpg")
    assert question("<image> or <image>?", [DOG, other]).content == (DOG, " or ", other, "?")


def test_a_placeholder_of_a_modality_that_is_not_attached_is_text() -> None:
    turn = question("What does the <audio> tag mean?", [DOG])
    assert turn.content == ("What does the <audio> tag mean?", "\n", DOG)


def test_more_placeholders_than_media_are_refused_by_number() -> None:
    with pytest.raises(RecordError, match=r"q\.jsonl:3: the question has 2 <image> placeholders"):
        question("<image> <image>", [DOG], where="q.jsonl:3")


def test_a_question_of_media_alone_has_no_empty_line() -> None:
    assert question("", [DOG]).content == (DOG,)


def test_an_answer_is_plain_text_whatever_it_says() -> None:
    assert answer("see <image>").content == ("see <image>",)
    assert answer("").content == ()


def test_place_media_returns_what_found_no_place() -> None:
    content, rest = place_media("a <image> b", [BARK, DOG])
    assert content == ("a ", DOG, " b")
    assert rest == [BARK]

import json

import pytest

from chatbind_cli.data.conversations import parse_conversation
from chatbind_cli.jsonl import read_records
from chatbind_cli.toy.digits import NAMES, load_items
from chatbind_cli.toy.texts import QUESTIONS, captions, question, spoken_of, write_records

MODALITIES = ("image", "video", "audio", "depth", "thermal", "imu")


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    train, heldout = load_items()
    folder = tmp_path_factory.mktemp("records")
    write_records(train[:60], heldout[:100], folder, seed=0)
    return folder


def _records(path):
    return [record for record, _ in read_records(path)]


@pytest.mark.parametrize("name", ["captions", "instructions"])
def test_training_files_are_conversations_about_training_images(folder, name):
    train, _ = load_items()
    path = folder / f"train/{name}.json"
    found = [parse_conversation(record, where) for record, where in read_records(path)]
    assert len(found) == 60
    for item, conversation in zip(train, found, strict=False):
        (medium,) = conversation.media
        assert medium.modality == "image"
        assert medium.ref == f"image/train-{item.number:04d}.png"
    assert isinstance(json.loads(path.read_text()), list)


def test_instructions_have_llavas_categories_and_right_answers(folder):
    train, _ = load_items()
    answers = {w: q.answer for q in QUESTIONS for w in q.wordings}
    records = json.loads((folder / "train/instructions.json").read_text())
    assert {record["category"] for record in records} == {"conv", "detail", "complex"}
    for item, record in zip(train, records, strict=False):
        turns = [turn["value"] for turn in record["conversations"]]
        for asked, said in zip(turns[::2], turns[1::2], strict=True):
            asked = asked.replace("<image>", "").strip()
            assert said == answers[asked](item.digit)


def test_the_image_stands_before_and_after_the_words(folder):
    records = json.loads((folder / "train/captions.json").read_text())
    before = [r["conversations"][0]["value"].startswith("<image>\n") for r in records]
    assert 10 < sum(before) < 50


@pytest.mark.parametrize("modality", MODALITIES)
def test_questions_are_about_held_out_files_and_each_has_its_reference(folder, modality):
    _, heldout = load_items()
    digits = {item.stem: item.digit for item in heldout}
    asked = _records(folder / f"eval/questions-{modality}.jsonl")
    answers = _records(folder / f"eval/answers-reference-{modality}.jsonl")
    assert [q["question_id"] for q in asked] == [a["question_id"] for a in answers]
    assert len({q["question_id"] for q in asked}) == len(asked) == 150
    for record, answer in zip(asked, answers, strict=True):
        assert record[modality].startswith(f"{modality}/heldout-")
        stem = record[modality].split("/")[1].split(".")[0]
        assert answer["text"] == record["answer"]
        assert NAMES[digits[stem]] in answer["text"].lower()
        assert answer["category"] == record["category"]
    which = [q for q in asked if q["question_id"].endswith("-which")]
    assert len(which) == 100
    assert max(sum(q["answer"] == w["answer"] for q in which) for w in which) == 10


def test_one_context_serves_all_files_of_an_item(folder):
    contexts = _records(folder / "eval/contexts.jsonl")
    assert len(contexts) == 100
    assert contexts[7]["audio"] == "audio/heldout-0007.wav"
    assert contexts[7]["image"] == "image/heldout-0007.png"
    assert contexts[7]["instances"][0]["category"] in NAMES
    assert contexts[7]["captions"]

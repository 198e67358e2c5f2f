"""The library's front door: answers, streams, batches, weights, mixes, dialogues."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chatbind_cli.data.tokens import PromptEncoder, TokenizedSample
from chatbind_cli.encoders.imagebind.preprocess import load_media
from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.errors import ChatBindError, MediaError, RecordError
from chatbind_cli.inbox import Inbox
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.questions import Question
from chatbind_cli.media.medium import Medium
from chatbind_cli.model.loading import load_chatbind
from chatbind_cli.model.turns import answer, question
from tests.inference.world import World

SHORT = GenerationSettings(max_new_tokens=10)


@pytest.fixture(scope="module")
def answerer(world: World) -> Answerer:
    return Answerer.from_pretrained(world.model, device="cpu")


def prompt(question: Question) -> TokenizedSample:
    assert question.prompt is not None, question.problem
    return question.prompt


def embeddings(question: Question) -> torch.Tensor:
    rows = [m.embedding for m in prompt(question).media if m.embedding is not None]
    return torch.stack(rows)


@torch.no_grad()
def by_hand(
    world: World, text: str, files: list[Path], weights: list[float] | None = None, length: int = 10
) -> str:
    """Greedy decoding without cache, batches, `generate` or any code of this folder."""
    bundle = load_chatbind(world.model, dtype=torch.float32)
    refs = [Medium(load_media(file).modality, str(file)) for file in files]
    encoder = open_encoder(world.encoder)
    turn = question(text, refs)
    media = torch.cat(
        [torch.empty(0, 8)]
        + [encoder.embed([load_media(Path(m.name))], normalize=False) for m in turn.media]
    )
    ids = PromptEncoder(bundle.tokenizer, bundle.config).prompt([turn]).input_ids
    start = len(ids)
    while len(ids) < start + length:
        model: Any = bundle.model
        logits = model(
            torch.tensor([ids]),
            media_embeddings=media if len(media) else None,
            media_weights=None if weights is None else torch.tensor(weights),
        ).logits
        token = int(logits[0, -1].argmax())
        if token == bundle.tokenizer.eos_token_id:
            break
        ids.append(token)
    return bundle.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("What is this?", ["2.png"]),
        ("What is <audio> beside <image> of the dog?", ["1.png", "tone.wav"]),
        ("Describe a bird.", []),
    ],
)
def test_an_answer_is_the_greedy_one(
    world: World, answerer: Answerer, text: str, names: list[str]
) -> None:
    files = [world.media / name for name in names]
    wanted = by_hand(world, text, files)
    assert answerer.answer(text, files, settings=SHORT) == wanted
    assert "".join(answerer.stream(text, files, settings=SHORT)) == wanted
    assert wanted


def test_answers_depend_on_the_media(world: World, answerer: Answerer) -> None:
    names = ["0.png", "1.png", "tone.wav", "depth.png"]
    asked = [("What is this?", [world.media / name]) for name in names]
    assert len(set(answerer.answer_batch(asked, settings=SHORT))) == len(names)


def test_a_padded_batch_gives_what_each_question_gets_alone(
    world: World, answerer: Answerer
) -> None:
    asked: list[tuple[str, list[Path]]] = [
        ("What?", []),
        ("What about this brown dog, with a white chest?", [world.media / "3.png"]),
        ("<image> or <audio>?", [world.media / "tone.wav", world.media / "4.png"]),
    ]
    alone = [answerer.answer(text, media, settings=SHORT) for text, media in asked]
    assert answerer.answer_batch(asked, settings=SHORT) == alone


def test_a_question_without_media_needs_no_encoder(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer = Answerer.from_pretrained(world.model, encoder="nowhere", device="cpu")
    assert answerer.answer("Describe a bird.", settings=SHORT)
    with pytest.raises(ChatBindError, match="nowhere"):
        answerer.answer("What is this?", [world.media / "0.png"], settings=SHORT)


def test_only_the_towers_that_are_needed_are_read(world: World) -> None:
    answerer = Answerer.from_pretrained(world.model, device="cpu")
    answerer.answer("What is this?", [world.media / "tone.wav"], settings=SHORT)
    media_encoder: Any = answerer.media_encoder
    assert list(media_encoder.encoder.loaded) == ["audio"]


def test_a_weight_multiplies_the_normalised_embedding(world: World, answerer: Answerer) -> None:
    [plain] = answerer.prepare([Question("?", (Medium(None, world.media / "2.png"),))])
    [halved] = answerer.prepare([Question("?", (Medium(None, world.media / "2.png", weight=0.5),))])
    model: Any = answerer.model
    bias = model.projector.layers[0].bias

    def soft(question: Question) -> torch.Tensor:
        weights = torch.tensor([medium.weight for medium in prompt(question).media])
        return model.soft_tokens(embeddings(question), weights)[0, 0] - bias

    torch.testing.assert_close(soft(halved), 0.5 * soft(plain))
    assert soft(plain).norm() > 1


def test_an_answer_depends_on_the_weight_as_the_models_own_does(
    world: World, answerer: Answerer
) -> None:
    image = world.media / "2.png"
    wanted = by_hand(world, "What is this?", [image], [-1.0])
    media = [Medium(None, image, weight=-1.0)]
    assert answerer.answer("What is this?", media, settings=SHORT) == wanted
    assert wanted != answerer.answer("What is this?", [image], settings=SHORT)


def test_a_mix_is_one_embedding_between_the_others(world: World, answerer: Answerer) -> None:
    names = (world.media / "2.png", world.media / "tone.wav")
    encoder = open_encoder(world.encoder)
    first, second = encoder.embed([load_media(name) for name in names], normalize=True)
    wanted = torch.nn.functional.normalize(first + 0.25 * second, dim=0)
    media = (Medium(None, names[0]), Medium(None, names[1], weight=0.25))
    [mixed] = answerer.prepare([Question("What is this?", media, mix=True)])
    torch.testing.assert_close(embeddings(mixed), wanted.unsqueeze(0))
    assert [medium.modality for medium in prompt(mixed).media] == ["image"]


def test_one_bad_file_spoils_only_its_own_question(
    world: World, answerer: Answerer, tmp_path: Path
) -> None:
    broken = tmp_path / "x.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n broken")
    good = Question("What is this?", (Medium(None, world.media / "0.png"),))
    results = answerer.prepare(
        [
            good,
            Question("?", (Medium(None, broken),)),
            Question("<image> <image>", good.media),
            good,
        ]
    )
    assert isinstance(results[1].problem, MediaError)
    assert isinstance(results[2].problem, RecordError)
    assert "2 <image> placeholders but 1 image" in str(results[2].problem)
    assert prompt(results[0]).input_ids == prompt(results[3]).input_ids


def test_what_was_said_before_is_read_with_its_media(world: World, answerer: Answerer) -> None:
    image, sound = world.media / "5.png", world.media / "tone.wav"
    [first] = answerer.prepare([Question("What is this?", (Medium(None, image),))])
    assert first.turn
    [second] = answerer.prepare(
        [Question("And <audio>?", (Medium(None, sound),))], history=[first.turn, answer("A dog.")]
    )
    assert second.turn
    encoder = open_encoder(world.encoder)
    wanted = encoder.embed([load_media(image), load_media(sound)], normalize=False)
    assert torch.equal(embeddings(second), wanted)
    text = "What is this? dog And"
    ids = prompt(second).input_ids
    decoded = load_chatbind(world.model).tokenizer.decode(ids)
    assert all(word in decoded for word in text.split())
    # a history in another order keeps each medium with its own turn
    history = [second.turn, answer("x"), first.turn, answer("y")]
    [swapped] = answerer.prepare([Question("?", ())], history=history)
    assert torch.equal(embeddings(swapped), wanted.flip(0))


def test_a_stream_can_be_left_at_any_time(world: World, answerer: Answerer) -> None:
    settings = GenerationSettings(max_new_tokens=400)
    before = threading.active_count()
    pieces = answerer.stream("Describe a bird.", settings=settings)
    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert first
    assert threading.active_count() == before


def test_a_prompt_that_fills_the_context_is_an_error_that_says_so(answerer: Answerer) -> None:
    [result] = answerer.prepare([Question("dog " * 600)])
    assert isinstance(result.problem, RecordError)
    assert "the model reads 512 at most" in str(result.problem)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_an_answer_never_reaches_beyond_the_context(answerer: Answerer, num_beams: int) -> None:
    settings = GenerationSettings(max_new_tokens=200, num_beams=num_beams)
    [long] = answerer.prepare([Question("dog " * 130)])
    [short] = answerer.prepare([Question("What is this?")])
    room = 512 - len(prompt(long).input_ids)
    assert 0 < room < 150
    results = answerer.generate([long, short], settings)
    assert results[0].n_tokens <= room
    # the long prompt does not cut the short one's answer
    assert results[1] == answerer.generate([short], settings)[0]


def inbox_of(questions: Iterable[Question]) -> Inbox[Question]:
    inbox: Inbox[Question] = Inbox(1000)
    for one in questions:
        inbox.put(one)
    return inbox


def test_a_run_answers_as_questions_come(world: World, answerer: Answerer, tmp_path: Path) -> None:
    texts = [f"What about the {'brown ' * (n % 5)}dog {n}?" for n in range(40)]
    media = [(Medium(None, world.media / f"{n % 6}.png"),) * (n % 3 > 0) for n in range(40)]
    asked = [Question(text, m, id=n) for n, (text, m) in enumerate(zip(texts, media, strict=True))]
    asked[7] = replace(asked[7], problem=RecordError("said before"))
    asked[9] = replace(asked[9], media=(Medium(None, tmp_path / "none.png"),))
    inbox = inbox_of(asked[:2])
    run = answerer.run(inbox, SHORT)
    # nobody waits for those that have not asked yet
    first = dict([next(run), next(run)])
    for one in asked[2:]:
        inbox.put(one)
    inbox.close(RecordError("the file ends in the middle"))
    outcomes = {question.id: outcome for question, outcome in first.items()}
    with pytest.raises(RecordError, match="in the middle"):
        for question, outcome in run:
            outcomes[question.id] = outcome
    assert sorted(outcomes) == [*range(40)]  # type: ignore[type-var]
    assert "said before" in str(outcomes.pop(7))
    assert "none.png" in str(outcomes.pop(9))
    for n, outcome in outcomes.items():
        assert isinstance(outcome, Generated)
        assert isinstance(n, int)
        files = [medium.ref for medium in media[n]]
        assert outcome.text == answerer.answer(texts[n], files, settings=SHORT)


@pytest.mark.parametrize(("close", "count"), [(True, 500), (False, 500), (True, 1)])
def test_a_run_that_is_left_ends_its_threads(answerer: Answerer, close: bool, count: int) -> None:
    before = threading.active_count()
    inbox = inbox_of(Question("What?", id=n) for n in range(count))
    run = answerer.run(inbox, SHORT)
    next(run)
    if close:
        run.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises(KeyboardInterrupt):
            run.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert not inbox.put(Question("Who?"))


def test_an_encoder_that_is_not_there_ends_a_run(world: World) -> None:
    answerer = Answerer.from_pretrained(world.model, encoder="nowhere", device="cpu")
    asked = [Question("What?", id=0), Question("?", (Medium(None, world.media / "1.png"),), id=1)]
    with pytest.raises(ChatBindError, match="nowhere"):
        list(answerer.run(inbox_of(asked), SHORT))


def test_a_question_of_megabytes_is_refused_before_it_is_tokenized(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answerer, "prompts", None)
    (refused,) = answerer.prepare([Question("word " * 1_000_000)])
    assert "5,000,000 characters" in str(refused.problem)


def test_a_question_may_bring_its_own_system_text(answerer: Answerer) -> None:
    asked, told = answerer.prepare([Question("What?"), Question("What?", system="A dog.")])
    assert asked.prompt is not None
    assert told.prompt is not None
    assert told.turn is not None
    wanted = answerer.prompts.prompt([told.turn], "A dog.")
    assert told.prompt.input_ids == wanted.input_ids != asked.prompt.input_ids

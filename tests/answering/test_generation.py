"""Generation: stop texts, sampling, beams."""

from __future__ import annotations

import pytest
import torch

from chatbind_cli.answering.generation import Generated
from chatbind_cli.answering.session import Answerer, Asked, Prepared
from chatbind_cli.answering.settings import GenerationSettings
from chatbind_cli.errors import RecordError
from tests.answering.world import World

TEXTS = ["Describe a bird.", "What about the red car?", "And the brown dog over there?"]


@pytest.fixture(scope="module")
def answerer(world: World) -> Answerer:
    return Answerer.from_pretrained(world.model, device="cpu")


def answers(answerer: Answerer, salt: str = "", **values: object) -> list[Generated]:
    settings = GenerationSettings(**{"max_new_tokens": 12, **values})
    prepared = answerer.prepare([Asked(text) for text in TEXTS])
    return answerer.generate([p for p in prepared if isinstance(p, Prepared)], settings, salt=salt)


def test_a_stop_text_ends_an_answer_and_is_not_part_of_it(answerer: Answerer) -> None:
    plain = answers(answerer)
    row = max(range(len(TEXTS)), key=lambda index: len(plain[index].text))
    text = plain[row].text
    stop = text[len(text) // 2 :][:3]
    stopped = answers(answerer, stop=(stop,))
    assert stopped[row].text == text.split(stop)[0].strip()
    assert stopped[row].finish_reason == "stop"
    assert stopped[row].n_tokens < plain[row].n_tokens == 12
    # what a row counts does not depend on how long the others went on
    settings = GenerationSettings(max_new_tokens=12, stop=(stop,))
    [prepared] = answerer.prepare([Asked(TEXTS[row])])
    assert isinstance(prepared, Prepared)
    assert answerer.generate([prepared], settings) == [stopped[row]]
    assert "".join(answerer.stream(TEXTS[row], settings=settings)) == stopped[row].text


def test_sampling_is_decided_by_seed_and_salt_alone(answerer: Answerer) -> None:
    torch.manual_seed(0)
    first = answers(answerer, temperature=1.0, seed=5)
    torch.rand(7)
    state = torch.get_rng_state()
    assert answers(answerer, temperature=1.0, seed=5) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert answers(answerer, temperature=1.0, seed=6) != first
    assert answers(answerer, temperature=1.0, seed=5, salt="next batch") != first


def test_almost_no_temperature_is_greedy(answerer: Answerer) -> None:
    assert answers(answerer, temperature=1e-4) == answers(answerer)
    assert answers(answerer, temperature=1.0, top_p=1e-6) == answers(answerer)


def test_beams_find_an_answer_at_least_as_likely(answerer: Answerer) -> None:
    greedy, beams = answers(answerer), answers(answerer, num_beams=4)
    assert [b.text for b in beams] != [g.text for g in greedy]
    text = "".join(
        answerer.stream(TEXTS[0], settings=GenerationSettings(max_new_tokens=12, num_beams=4))
    )
    assert text == beams[0].text


@pytest.mark.parametrize("values", [{}, {"num_beams": 2}, {"temperature": 1.0}])
def test_a_model_that_computes_nonsense_gives_no_empty_answer(
    world: World, values: dict[str, float]
) -> None:
    broken = Answerer.from_pretrained(world.model, device="cpu")
    with torch.no_grad():
        broken.model.get_output_embeddings().weight[3] = float("nan")
    with pytest.raises(RecordError, match="numbers for this question are not finite"):
        answers(broken, **values)

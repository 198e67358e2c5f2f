"""Generation: stop texts, sampling, beams."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from chatbind_cli.errors import CheckpointError, RecordError
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.loaded_model import load_model
from chatbind_cli.inference.questions import Question
from chatbind_cli.model.config import saved_end_ids
from tests.inference.world import World
from tests.model.tiny import save_chatbind

TEXTS = ["Describe a bird.", "What about the red car?", "And the brown dog over there?"]


@pytest.fixture(scope="module")
def answerer(world: World) -> Answerer:
    return Answerer.from_pretrained(world.model, device="cpu")


def answers(answerer: Answerer, **values: object) -> list[Generated]:
    settings = GenerationSettings(**{"max_new_tokens": 12, **values})
    prepared = answerer.prepare([Question(text, id=text) for text in TEXTS])
    return answerer.generate(prepared, settings)


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
    [prepared] = answerer.prepare([Question(TEXTS[row])])
    assert answerer.generate([prepared], settings) == [stopped[row]]
    assert "".join(answerer.stream(TEXTS[row], settings=settings)) == stopped[row].text


def test_sampling_is_decided_by_seed_and_id_alone(answerer: Answerer) -> None:
    torch.manual_seed(0)
    first = answers(answerer, temperature=1.0, seed=5)
    torch.rand(7)
    state = torch.get_rng_state()
    assert answers(answerer, temperature=1.0, seed=5) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert answers(answerer, temperature=1.0, seed=6) != first
    settings = GenerationSettings(max_new_tokens=12, temperature=1.0, seed=5)
    for text, wanted in zip(TEXTS, first, strict=True):
        same, other = answerer.prepare([Question(text, id=text), Question(text, id=1)])
        assert answerer.generate([same], settings) == [wanted]
        assert answerer.generate([other], settings) != [wanted]


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


LEAKS: dict[str, object] = {
    "repetition_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[token] for token in range(5, 20)],
    "max_time": 0.0,
    "min_new_tokens": 12,
    "forced_eos_token_id": 2,
    "suppress_tokens": list(range(20, 40)),
    "begin_suppress_tokens": list(range(3, 40)),
    "temperature": 0.01,
    "top_p": 0.01,
    "top_k": 1,
    "min_p": 0.9,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "length_penalty": -9.0,
    "guidance_scale": 9.0,
    "prompt_lookup_num_tokens": 3,
    "stop_strings": ["a", "e", "o"],
    "exponential_decay_length_penalty": [1, 50.0],
    "sequence_bias": [[[5], 50.0], [[9], 40.0]],
    "encoder_repetition_penalty": 5.0,
    "penalty_alpha": 0.6,
    "custom_generate": "somebody/code",
    "cache_implementation": "static",
    "compile_config": {"mode": "default"},
    "num_return_sequences": 3,
    "return_dict_in_generate": True,
    "num_beams": 4,
    "watermarking_config": {"bias": 20.0, "context_width": 1},
}


def made(folder: Path, projector: Path | None = None) -> list[list[Generated]]:
    """Greedy answers, sampled ones and those of beam search."""
    answerer = Answerer.from_pretrained(folder, projector=projector, device="cpu")
    how: list[dict[str, object]] = [{}, {"temperature": 1.0, "seed": 3}, {"num_beams": 3}]
    return [answers(answerer, **values) for values in how]


def with_settings(path: Path, settings: dict[str, object]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_model_folder_does_not_choose_how_answers_are_made(world: World, tmp_path: Path) -> None:
    wanted = made(world.model)
    folder = shutil.copytree(world.model, tmp_path / "model")
    path = folder / "generation_config.json"
    original = path.read_bytes()
    for key, value in LEAKS.items():
        with_settings(path, {key: value})
        assert made(folder) == wanted, key
        path.write_bytes(original)


def test_neither_does_an_old_config_nor_a_language_model(world: World, tmp_path: Path) -> None:
    # no configuration class takes the last one
    leaks = {key: value for key, value in LEAKS.items() if key != "compile_config"}
    folder = shutil.copytree(world.model, tmp_path / "model")
    (folder / "generation_config.json").unlink()
    with_settings(folder / "config.json", leaks)
    assert made(folder) == made(world.model)
    base = shutil.copytree(world.llama, tmp_path / "llama")
    with_settings(base / "generation_config.json", LEAKS)
    assert made(base, world.projector) == made(world.llama, world.projector)


def test_every_end_token_of_a_model_ends_an_answer(world: World, tmp_path: Path) -> None:
    folder = shutil.copytree(world.llama, tmp_path / "llama")
    for name, ends in {"generation_config.json": [2, 7], "config.json": [2, 9]}.items():
        with_settings(folder / name, {"eos_token_id": ends})
    first = load_model(folder, projector=world.projector, device="cpu").bundle
    save_chatbind(first, tmp_path / "saved")
    again = load_model(tmp_path / "saved", device="cpu").bundle
    save_chatbind(again, tmp_path / "saved-again")
    for path in (tmp_path / "saved", tmp_path / "saved-again"):
        assert saved_end_ids(path) == [2, 7, 9]
        model = Answerer.from_pretrained(path, device="cpu").model
        assert {2, 7, 9} <= set(model.generation_config.eos_token_id)


def test_an_end_token_that_is_none_is_one_error(world: World, tmp_path: Path) -> None:
    folder = shutil.copytree(world.model, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": ["x"]}')
    with pytest.raises(CheckpointError, match="names no token"):
        load_model(folder, device="cpu")

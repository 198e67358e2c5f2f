"""Multiple choice: exact scores, one choice, and what records say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Lfm2Config

from chatbind_cli.data.tokens import TokenizedSample
from chatbind_cli.errors import RecordError
from chatbind_cli.inference import choices as of_choices
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.choices import likeliest, score_choices
from chatbind_cli.inference.questions import Question
from chatbind_cli.media.medium import Medium
from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration
from chatbind_cli.model.config import ChatBindConfig
from tests.inference.world import World
from tests.model.tiny import LANGUAGE_MODELS, SIZES, language_model

TEXTS = ("bird", "a brown dog", "a red car drives past the bird", "dog", "bird")


@pytest.fixture(scope="module")
def answerer(world: World) -> Answerer:
    return Answerer.from_pretrained(world.model, device="cpu")


def prepared(answerer: Answerer, world: World, choices: Sequence[str] = TEXTS) -> Question:
    media = (Medium("image", world.media / "2.png", weight=0.7),)
    [question] = answerer.prepare([Question("What is it?", media, choices=tuple(choices))])
    return question


def plain(model: Any, prompt: TokenizedSample, choice: Sequence[int]) -> float:
    """All of it read at once, without keys and values of anything."""
    ids = torch.tensor([[*prompt.input_ids, *choice]])
    embeddings = [m.embedding for m in prompt.media if m.embedding is not None]
    with torch.inference_mode():
        output = model(
            input_ids=ids,
            use_cache=False,
            media_embeddings=torch.stack(embeddings) if embeddings else None,
            media_weights=torch.tensor([m.weight for m in prompt.media]) if embeddings else None,
        )
    logprobs = output.logits[0, len(prompt.input_ids) - 1 : -1].log_softmax(-1)
    return float(logprobs.gather(1, torch.tensor(choice)[:, None]).sum())


@pytest.mark.parametrize("at_once", [1 << 14, 200, 1])
def test_scores_are_those_of_the_plain_computation(
    answerer: Answerer, world: World, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(of_choices, "_MOST_HELD", at_once)
    question = prepared(answerer, world)
    assert question.prompt is not None
    scores = score_choices(answerer.model, question.prompt, question.choice_ids)
    wanted = [plain(answerer.model, question.prompt, ids) for ids in question.choice_ids]
    assert scores == pytest.approx(wanted, rel=1e-5)
    assert len(set(scores)) == len(set(TEXTS))
    assert scores[0] == scores[4]
    unweighted = (replace(question.prompt.media[0], weight=1.0),)
    heavier = replace(question.prompt, media=unweighted)
    assert score_choices(answerer.model, heavier, question.choice_ids) != scores


def hybrid() -> Any:
    """A language model that keeps more than keys and values."""
    sizes = {**SIZES, "layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Lfm2Config(**sizes)).eval()


@pytest.mark.parametrize("kind", [*sorted(LANGUAGE_MODELS), "hybrid"])
def test_every_kind_of_language_model_scores(kind: str) -> None:
    base = hybrid() if kind == "hybrid" else language_model(kind)
    config = ChatBindConfig(text_config=base.config, embedding_dim=8)
    model = ChatBindForConditionalGeneration(config, base).eval()
    prompt = TokenizedSample([5, 6, 7, 8, 9])
    choices = [[11], [11, 12, 2], [13, 14, 15, 16, 2]]
    wanted = [plain(model, prompt, ids) for ids in choices]
    assert score_choices(model, prompt, choices) == pytest.approx(wanted, rel=1e-5)


def test_the_likeliest_is_the_answer(answerer: Answerer, world: World) -> None:
    answer = likeliest(answerer.model, prepared(answerer, world))
    best = max(answer.choices, key=lambda choice: choice.logprob)
    assert (answer.text, answer.n_tokens, answer.finish_reason) == (
        best.text,
        best.n_tokens,
        "stop",
    )
    assert [choice.text for choice in answer.choices] == list(TEXTS)


def test_a_choice_ends(answerer: Answerer, world: World) -> None:
    """What begins as another choice does not stand for it."""
    question = prepared(answerer, world, ["a", "a brown", "a brown dog"])
    assert all(ids[-1] == answerer.prompts.stop_token_ids[0] for ids in question.choice_ids)


def test_thousands_of_choices_and_long_ones(answerer: Answerer, world: World) -> None:
    many = [f"{a}{b}" for a in "abcdefghij" for b in range(200)]
    answer = likeliest(answerer.model, prepared(answerer, world, many))
    assert len(answer.choices) == 2000
    problem = prepared(answerer, world, ["dog", "bird " * 600]).problem
    assert isinstance(problem, RecordError)
    assert "choice 2 has" in str(problem)
    assert "512 at most" in str(problem)
    assert prepared(answerer, world, ["x" * 1_000_000]).problem is not None


def test_choices_that_do_not_fit_in_memory_are_fewer_at_a_time(
    answerer: Answerer, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = prepared(answerer, world)
    wanted = likeliest(answerer.model, question)
    behind, at_once = of_choices._behind, []

    def small(*args: Any) -> torch.Tensor:
        at_once.append(len(args[-1]))
        if at_once[-1] > room:
            raise torch.OutOfMemoryError("out of memory")
        return behind(*args)

    monkeypatch.setattr(of_choices, "_behind", small)
    room = 1
    found = likeliest(answerer.model, question)
    assert at_once == [4, 2, 1, 1, 1, 1]
    assert [choice.logprob for choice in found.choices] == pytest.approx(
        [choice.logprob for choice in wanted.choices], rel=1e-5
    )
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        likeliest(answerer.model, question)


def test_numbers_that_are_none_fail(world: World) -> None:
    broken = Answerer.from_pretrained(world.model, device="cpu")
    with torch.no_grad():
        broken.model.get_output_embeddings().weight[3] = float("nan")
    with pytest.raises(RecordError, match="numbers for this question are not finite"):
        likeliest(broken.model, prepared(broken, world))

"""A batch whose rows come and go: the same tokens as `generate` gives each prompt alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from chatbind_cli.data.tokens import TokenizedSample
from chatbind_cli.errors import ChatBindError
from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.questions import Question
from chatbind_cli.inference.rows import Rows
from chatbind_cli.inference.sampling import NextToken, choose
from chatbind_cli.media.medium import Medium
from tests.inference.small_engine import (
    END_OF_MEDIUM,
    KINDS,
    PATCH,
    START,
    SYSTEM,
    alone,
    chatbind,
    engine,
    prompts_of,
    question,
    run,
    texts,
)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_each_prompt_alone(kind: str) -> None:
    model = chatbind(kind)
    asked = [question(n) for n in range(18)]
    one = engine(model, 4)  # makes the end tokens known
    answers = {n: alone(model, asked[n]) for n in range(18)}
    assert texts(run(one, asked)) == answers
    assert one._rows_work == (kind != "lfm2")
    assert texts(run(engine(model, 7), asked[::-1])) == answers
    assert len(set(answers.values())) >= 10


def test_how_an_answer_is_chosen_is_its_own_affair() -> None:
    model = chatbind()
    asked = [
        question(n, repetition_penalty=1.0 + n % 3, no_repeat_ngram_size=n % 2) for n in range(12)
    ]
    one = engine(model, 5)
    wanted = {n: alone(model, asked[n]) for n in range(12)}
    assert wanted != {n: alone(model, question(n)) for n in range(12)}
    mixed = [*asked, *(replace(question(n, temperature=0.8), id=100 + n) for n in range(9))]
    found = texts(run(one, mixed))
    assert {n: found[n] for n in range(12)} == wanted


SAMPLED: list[dict[str, Any]] = [
    {},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.1},
    {"repetition_penalty": 2.0},
]


def test_draws_do_not_depend_on_neighbours() -> None:
    model = chatbind()
    asked = [
        question(n, temperature=1.0, samples=1 + n % 3, seed=n // 9, **SAMPLED[n % 5])
        for n in range(18)
    ]
    one_by_one = run(engine(model, 1), asked)
    assert run(engine(model, 7), asked[::-1]) == one_by_one
    for identity, outcome in one_by_one.items():
        assert isinstance(outcome, Generated)
        assert len(outcome.samples) == (identity % 3 + 1 if identity % 3 else 0)
        assert replace(outcome, samples=()) == (outcome.samples or (outcome,))[0]
        assert len(set(outcome.samples)) > 1 or len(outcome.samples) < 3


@pytest.mark.parametrize("few", [{"top_k": 4}, {"min_p": 0.2}, {"top_p": 0.5}])
def test_draws_follow_the_models_chances(few: dict[str, Any]) -> None:
    """Of a thousand answers of one token, each comes as often as `softmax` says."""
    model = chatbind()
    asked = question(1, temperature=2.0, samples=1000, max_new_tokens=1, **few)
    outcome = run(engine(model, 100), [asked])[1]
    assert isinstance(outcome, Generated)
    assert asked.prompt is not None
    [medium] = asked.prompt.media
    logits = model(
        torch.tensor([asked.prompt.input_ids]),
        media_embeddings=medium.embedding[None],  # type: ignore[index]
        media_weights=torch.tensor([medium.weight]),
    ).logits[0, -1]
    chances, tokens = (logits[:97] / 2).softmax(0).sort(descending=True)
    among = {
        "top_k": torch.arange(97) < 4,
        "min_p": chances >= 0.2 * chances[0],
        "top_p": chances.cumsum(0) - chances < 0.5,
    }
    [kind] = few
    chances = chances * among[kind]
    assert 2 < int(among[kind].sum()) < 40
    for token, chance in zip(tokens.tolist(), (chances / chances.sum()).tolist(), strict=True):
        drawn = sum(sample.text == str(token) for sample in outcome.samples)
        if token != 2:  # the end is no word
            assert abs(drawn - 1000 * chance) < 4 * (1000 * chance * (1 - chance)) ** 0.5 + 1e-9


def test_every_token_has_a_draw_of_its_own() -> None:
    [ask] = engine(chatbind())._asks(question(1, temperature=1.0), GenerationSettings())
    draws = []
    for token in range(50):
        draws.append(ask.draw())
        ask.take(NextToken(token))
    assert len(set(draws)) == 50
    assert 0 <= min(draws) < 0.2
    assert 0.8 < max(draws) < 1


def assert_log_probabilities(model: Any, asked: Question, outcome: Generated) -> None:
    prompt = asked.prompt
    assert prompt is not None
    new = [int(word) for word in outcome.text.split()]
    media = [medium.embedding for medium in prompt.media if medium.embedding is not None]
    logits = model(
        torch.tensor([[*prompt.input_ids, *new]]),
        media_embeddings=torch.stack(media) if media else None,
        media_weights=torch.tensor([m.weight for m in prompt.media]) if media else None,
    ).logits[0, len(prompt.input_ids) - 1 : -1]
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None])[:, 0]
    assert outcome.logprobs is not None
    assert len(outcome.logprobs) == outcome.n_tokens == len(outcome.tokens or ())
    torch.testing.assert_close(torch.tensor(outcome.logprobs), wanted, rtol=1e-4, atol=1e-5)


def test_log_probabilities_are_the_models_own() -> None:
    model = chatbind()
    asked = [question(n, logprobs=True, temperature=1.5 * (n % 2)) for n in range(6)]
    for n, outcome in run(engine(model, 4), asked).items():
        assert isinstance(outcome, Generated)
        assert_log_probabilities(model, asked[n], outcome)


def test_a_finished_row_makes_room_for_a_question(reads: list[tuple[int, int]]) -> None:
    one = engine(chatbind(), 4)
    assert one._rows_work
    del reads[:]
    lengths = [4] * 13
    lengths[5] = 40  # the longest prompt, which comes first
    asked = [question(n, max_new_tokens=length) for n, length in enumerate(lengths)]
    total = sum(one.n_tokens for one in run(one, asked).values() if isinstance(one, Generated))
    assert total == sum(lengths)
    steps = [rows for rows, tokens in reads if tokens == 1]
    # no row is read that has ended: each token but an answer's first is read once
    assert sum(steps) == total - len(asked)
    assert max(steps) == 4
    assert len(steps) == 39


def test_what_prompts_begin_with_is_read_once(reads: list[tuple[int, int]]) -> None:
    one = engine(chatbind(), 4)
    assert one._rows_work
    del reads[:]
    asked = [question(n) for n in range(24)]
    run(one, asked)
    first, *rest = prompts_of(reads)
    assert first == (1, len(SYSTEM))
    assert max(tokens for _, tokens in rest) == 22
    # another system prompt is learned in its turn
    other = [
        replace(q, prompt=TokenizedSample([1, *range(60, 80), 30 + n, 25]))
        for n, q in enumerate(asked)
    ]
    del reads[:]
    answers = texts(run(one, other))
    assert prompts_of(reads)[0] == (1, 21)
    assert answers == {q.id: alone(one._model, q) for q in other}


class Failing:
    """Makes a model fail on some of what it reads."""

    def __init__(self, model: Any, fails: Any) -> None:
        self.rows: list[int] = []
        self.failed_at = 0
        forward = model.language_model.forward

        def guarded(*args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)  # so that keys and values are in part there
            rows = kwargs["inputs_embeds"].shape[0]
            self.rows.append(rows)
            if (error := fails(kwargs)) is not None:
                self.failed_at = len(self.rows)
                raise error
            return result

        model.language_model.forward = guarded


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"
    ),
    RuntimeError("shapes do not fit"),
]


@pytest.mark.parametrize("error", MEMORY)
@pytest.mark.parametrize("prompts", [True, False])
def test_a_batch_that_is_too_large_is_halved(error: Exception, prompts: bool) -> None:
    model = chatbind()
    asked = [question(n, temperature=float(n % 2)) for n in range(20)]
    wanted = run(engine(model, 8), asked)

    def fails(inputs: dict[str, Any]) -> Exception | None:
        rows, length, _ = inputs["inputs_embeds"].shape
        return error if rows > 3 and (length > 1) == prompts else None

    failing = Failing(model, fails)
    assert run(engine(model, 8), asked) == wanted
    assert max(failing.rows) > 3


def test_a_batch_that_was_halved_grows_again() -> None:
    model = chatbind()
    one = engine(model, 4)
    assert one._rows_work
    failures = [MEMORY[0]]

    def fails(inputs: dict[str, Any]) -> Exception | None:
        return failures.pop() if failures and len(inputs["inputs_embeds"]) == 4 else None

    failing = Failing(model, fails)
    run(one, [question(n, max_new_tokens=4) for n in range(40)])
    failed = failing.rows.index(4)
    again = failing.rows.index(4, failed + 1)
    assert max(failing.rows[failed + 1 : again]) == 2
    assert again > 4 * 4 * 3 / 2  # steps of two rows for four batches of answers


@pytest.mark.parametrize("position", [59, 61])
@pytest.mark.parametrize("error", MEMORY)
def test_a_question_that_fails_alone_takes_no_other_with_it(
    error: Exception, position: int
) -> None:
    """It fails in its prompt, or at the second token of its answer."""
    model = chatbind()
    asked = [question(n, max_new_tokens=6) for n in range(12)]
    wanted = texts(run(engine(model, 8), asked))
    # no other gets as far
    prompt = TokenizedSample([1, *range(30, 88), 25])
    broken = replace(asked[5], id=99, prompt=prompt, where="x:7")

    def fails(inputs: dict[str, Any]) -> Exception | None:
        positions = inputs["position_ids"]  # the trial of the model comes without
        return error if positions is not None and (positions == position).any() else None

    failing = Failing(model, fails)
    for batch_size in (1, 8):
        found = run(engine(model, batch_size), [*asked, broken])
        failure = found.pop(99)
        assert texts(found) == wanted
        assert isinstance(failure, ChatBindError)
        assert str(failure).startswith("x:7: ")
    # it was to blame, and the others are together again
    assert max(failing.rows[failing.failed_at :]) == 8


def test_what_has_no_room_beside_others_waits_for_them() -> None:
    model = chatbind()
    one = engine(model, 2)
    assert one._rows_work
    # no two end together
    asked = [question(n, max_new_tokens=5 + 3 * n) for n in range(9)]
    wanted = texts(run(one, asked))
    refused: list[int] = []

    def fails(inputs: dict[str, Any]) -> Exception | None:
        """A prompt has no room as long as another answer is under way."""
        rows, length, _ = inputs["inputs_embeds"].shape
        beside = rows == 1 and length > 1 and steps and steps[-1] == 2
        if beside and not refused:
            refused.append(1)
            return MEMORY[0]
        if length == 1:
            steps.append(rows)
        return None

    steps: list[int] = []
    Failing(model, fails)
    assert texts(run(one, asked)) == wanted
    assert refused


def test_what_fails_where_a_token_is_chosen_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = chatbind()
    asked = [question(n, temperature=float(n % 2)) for n in range(12)]
    wanted = run(engine(model, 8), asked)
    calls: list[int] = []

    def fails(logits: torch.Tensor, *args: Any) -> Any:
        calls.append(len(logits))
        if len(calls) in (4, 9, 20):
            raise MEMORY[0]
        return choose(logits, *args)

    monkeypatch.setattr("chatbind_cli.inference.schedule.choose", fails)
    assert run(engine(model, 8), asked) == wanted
    assert len(calls) > 20


def test_nothing_of_a_row_is_left_where_others_stand_then() -> None:
    """Numbers that are none spoil a sum, however little they count in it."""
    model = chatbind()

    def row(*tokens: int) -> Rows:
        rows = Rows(model)
        rows.read([tokens])
        return rows

    rows = row(3, 4, 5, 6)
    rows.join(row(7, 8, 9, 10, 11, 12, 13, 14))
    with torch.inference_mode():
        for layer in rows._layers:
            layer.keys[1] = layer.values[1] = float("nan")
    rows.join(row(40, 41))
    rows.drop({1, 2})
    rows.join(row(15, 16))
    rows.join(row(17, 18, 19, 20, 21, 22, 23))
    found = rows.read([[30], [31], [32]])
    texts = ([3, 4, 5, 6, 30], [15, 16, 31], [*range(17, 24), 32])
    for logits, tokens in zip(found, texts, strict=True):
        torch.testing.assert_close(logits, row(*tokens[:-1]).read([tokens[-1:]])[0])


def test_a_gpu_that_is_out_of_order_ends_the_run() -> None:
    model = chatbind()
    one = engine(model, 8)
    assert one._rows_work
    Failing(model, lambda inputs: torch.AcceleratorError("CUDA error: device-side assert"))
    with pytest.raises(torch.AcceleratorError):
        run(one, [question(n) for n in range(4)])


def test_numbers_that_are_not_finite_are_the_failure_of_their_question() -> None:
    model = chatbind()
    asked = [question(n) for n in range(8)]
    wanted = texts(run(engine(model, 4), asked))
    bad = Medium("image", "", embedding=torch.full((8,), float("nan")))
    prompt = TokenizedSample([*SYSTEM, START, PATCH, PATCH, END_OF_MEDIUM, 25], [], (bad,))
    found = run(engine(model, 4), [*asked[:3], replace(asked[0], id=99, prompt=prompt), *asked[3:]])
    assert "not finite" in str(found.pop(99))
    # nothing of it is left where other rows stand then
    assert texts(found) == wanted


def test_what_keeps_more_than_keys_and_values_answers_in_fixed_batches(
    reads: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    model = chatbind("lfm2")
    one = engine(model, 4)
    assert not one._rows_work
    assert "in fixed batches: the language model keeps more" in capsys.readouterr().err
    asked = [question(n, logprobs=True, max_new_tokens=6) for n in range(6)]
    sampled = [replace(question(n, temperature=1.0, samples=2), id=n + 6) for n in range(3)]
    del reads[:]
    found = run(one, [*asked, *sampled])
    # greedy answers together, draws each alone
    assert sorted(rows for rows, _ in prompts_of(reads)) == [*[1] * 6, 2, 4]
    assert texts({n: found[n] for n in range(6)}) == {n: alone(model, asked[n]) for n in range(6)}
    assert run(engine(model, 4), sampled[::-1]) == {n: found[n] for n in range(6, 9)}
    assert all(len(found[n].samples) == 2 for n in range(6, 9))  # type: ignore[union-attr]
    for n in range(6):
        outcome = found[n]
        assert isinstance(outcome, Generated)
        assert_log_probabilities(model, asked[n], outcome)


def test_a_model_that_minds_its_neighbours_is_found_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = chatbind()
    forward = model.language_model.forward

    def minds(*args: Any, **kwargs: Any) -> Any:
        embeds = kwargs["inputs_embeds"]
        kwargs["inputs_embeds"] = embeds + embeds.mean() * (embeds.shape[0] > 1)
        return forward(*args, **kwargs)

    model.language_model.forward = minds
    assert not engine(model)._rows_work
    assert "says something else beside other rows" in capsys.readouterr().err

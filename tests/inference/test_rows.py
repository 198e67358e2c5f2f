"""A batch whose rows come and go: the same tokens as `generate` gives each prompt alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import wraps
from itertools import takewhile
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from chatbind_cli.data.tokens import TokenizedSample
from chatbind_cli.errors import ChatBindError
from chatbind_cli.inbox import Inbox
from chatbind_cli.inference.decoding import Generated, Outcome
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.local_engine import LocalEngine
from chatbind_cli.inference.questions import Question
from chatbind_cli.media.medium import Medium
from chatbind_cli.model.chatbind import ChatBindConfig, ChatBindForConditionalGeneration
from tests.model.tiny import SIZES, language_model

PATCH, START, END_OF_MEDIUM, EOS = 97, 98, 99, 2
SYSTEM = [1, *range(5, 25), *range(40, 50)]

FALCON = {k: SIZES[k] for k in SIZES if k not in ("head_dim", "num_key_value_heads")}
KINDS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES, max_position_embeddings=256),
    "qwen3": lambda: Qwen3Config(**SIZES, max_position_embeddings=256),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, max_position_embeddings=256),
    # they look back over four tokens only, in all layers or in every other one
    "mistral": lambda: MistralConfig(**SIZES, max_position_embeddings=256, sliding_window=4),
    "gemma2": lambda: Gemma2Config(**SIZES, sliding_window=4, tie_word_embeddings=False),
    # positions from the mask
    "falcon": lambda: FalconConfig(**FALCON, alibi=True),
    **{kind: None for kind in ("bloom", "opt", "gpt2", "mixtral")},
}


class Words:
    """A tokenizer whose tokens are numbers."""

    pad_token_id = 0
    bos_token_id = 1

    def decode(self, ids: list[int], **_: object) -> str:
        return " ".join(map(str, ids))


def chatbind(kind: str = "llama") -> Any:
    """Random weights that say much, so that each token depends on those before."""
    torch.manual_seed(0)
    made = KINDS[kind]
    base = language_model(kind) if made is None else AutoModelForCausalLM.from_config(made())
    for parameter in base.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    config = ChatBindConfig(
        text_config=base.config,
        embedding_dim=8,
        tokens_per_embedding=2,
        use_start_end=True,
        im_patch_id=PATCH,
        im_start_id=START,
        im_end_id=END_OF_MEDIUM,
    )
    return ChatBindForConditionalGeneration(config, base).eval()


def engine(model: Any, batch_size: int = 4) -> LocalEngine:
    return LocalEngine(model, Words(), stop_ids=[EOS], batch_size=batch_size)


def question(identity: int, **settings: Any) -> Question:
    """Of 33 to 53 tokens, with up to two media, and an answer of up to 14."""
    drawn = torch.Generator().manual_seed(identity)
    text = torch.randint(30, 90, (1 + identity * 5 % 13,), generator=drawn).tolist()
    media = tuple(
        Medium("image", "", embedding=torch.randn(8, generator=drawn) * 3, weight=0.5 + n)
        for n in range(identity % 3)
    )
    soft = [START, PATCH, PATCH, END_OF_MEDIUM] * len(media)
    prompt = TokenizedSample([*SYSTEM, *soft, *text, 25], [], media)
    length = settings.pop("max_new_tokens", 3 + identity * 7 % 12)
    return Question(
        id=identity,
        prompt=prompt,
        settings=GenerationSettings(max_new_tokens=length, **settings),
    )


def run(one: LocalEngine, questions: Sequence[Question]) -> dict[int, Outcome]:
    inbox: Inbox[Question] = Inbox(len(questions))
    for asked in questions:
        inbox.put(asked)
    inbox.close()
    found = {asked.id: outcome for asked, outcome in one.run(inbox, GenerationSettings())}
    assert len(found) == len(questions)
    return found  # type: ignore[return-value]


@torch.inference_mode()
def alone(model: Any, asked: Question) -> str:
    """The library's own greedy answer to one prompt."""
    prompt, settings = asked.prompt, asked.settings
    assert prompt is not None
    assert settings is not None
    media = [medium.embedding for medium in prompt.media if medium.embedding is not None]
    ids = torch.tensor([prompt.input_ids])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        media_embeddings=torch.stack(media) if media else None,
        media_weights=torch.tensor([m.weight for m in prompt.media]) if media else None,
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        repetition_penalty=settings.repetition_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
    )
    new = output[0, ids.shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    return Words().decode([*takewhile(lambda token: token not in ends, new)])


def texts(outcomes: dict[int, Outcome]) -> dict[int, str]:
    assert all(isinstance(outcome, Generated) for outcome in outcomes.values()), outcomes
    return {key: one.text for key, one in outcomes.items() if isinstance(one, Generated)}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_each_prompt_alone(kind: str) -> None:
    model = chatbind(kind)
    asked = [question(n) for n in range(18)]
    one = engine(model, 4)  # makes the end tokens known
    answers = {n: alone(model, asked[n]) for n in range(18)}
    assert texts(run(one, asked)) == answers
    assert one._rows_work
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


def test_draws_follow_the_models_chances() -> None:
    """Of a thousand answers of one token, each comes as often as `softmax` says."""
    model = chatbind()
    asked = question(1, temperature=2.0, samples=1000, max_new_tokens=1, top_k=4)
    outcome = run(engine(model, 100), [asked])[1]
    assert isinstance(outcome, Generated)
    assert asked.prompt is not None
    [medium] = asked.prompt.media
    logits = model(
        torch.tensor([asked.prompt.input_ids]),
        media_embeddings=medium.embedding[None],  # type: ignore[index]
        media_weights=torch.tensor([medium.weight]),
    ).logits[0, -1]
    top = logits[:97].topk(4)
    chances = (top.values / 2).softmax(0)
    for token, chance in zip(top.indices.tolist(), chances.tolist(), strict=True):
        drawn = sum(sample.text == str(token) for sample in outcome.samples)
        assert abs(drawn - 1000 * chance) < 4 * (1000 * chance * (1 - chance)) ** 0.5 + 1


def test_log_probabilities_are_the_models_own() -> None:
    model = chatbind()
    asked = [question(n, logprobs=True, temperature=1.5 * (n % 2)) for n in range(6)]
    for n, outcome in run(engine(model, 4), asked).items():
        assert isinstance(outcome, Generated)
        prompt = asked[n].prompt
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


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shape of everything that a model reads: rows, tokens."""
    shapes: list[tuple[int, int]] = []
    forward = ChatBindForConditionalGeneration.forward

    @wraps(forward)
    def counted(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        shapes.append((input_ids.shape[0], input_ids.shape[1]))
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(ChatBindForConditionalGeneration, "forward", counted)
    return shapes


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


def prompts_of(reads: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(rows, tokens) for rows, tokens in reads if tokens > 1]


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
        forward = model.language_model.forward

        def guarded(*args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)  # so that keys and values are in part there
            rows = kwargs["inputs_embeds"].shape[0]
            self.rows.append(rows)
            if (error := fails(kwargs)) is not None:
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

    Failing(model, fails)
    for batch_size in (1, 8):
        found = run(engine(model, batch_size), [*asked, broken])
        failure = found.pop(99)
        assert texts(found) == wanted
        assert isinstance(failure, ChatBindError)
        assert str(failure).startswith("x:7: ")


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


def test_a_model_that_keeps_more_than_keys_and_values_answers_in_fixed_batches(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = chatbind()
    forward = model.language_model.forward

    def ahead(*args: Any, **kwargs: Any) -> Any:
        embeds = kwargs["inputs_embeds"]
        kwargs["inputs_embeds"] = embeds + embeds.mean() * (embeds.shape[0] > 1)
        return forward(*args, **kwargs)

    asked = [question(n, temperature=float(n % 2), logprobs=n % 3 == 0) for n in range(8)]
    wanted = run(engine(model, 1), [q for q in asked if q.id in (0, 2, 4, 6)])
    model.language_model.forward = ahead
    one = engine(model, 1)
    found = run(one, asked)
    assert not one._rows_work
    assert "in fixed batches" in capsys.readouterr().err
    assert texts({n: found[n] for n in wanted}) == texts(wanted)
    assert found == run(engine(model, 1), asked[::-1])

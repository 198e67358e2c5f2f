"""One answer piece by piece, and turns of a dialogue: what was read before is not read again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from chatbind_cli.data.tokens import TokenizedSample
from chatbind_cli.errors import ChatBindError, RecordError
from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.local_engine import LocalEngine
from chatbind_cli.inference.questions import Question
from chatbind_cli.inference.stream import Stream
from chatbind_cli.media.medium import Medium
from tests.inference.small_engine import (
    END_OF_MEDIUM,
    PATCH,
    START,
    SYSTEM,
    alone,
    chatbind,
    engine,
    prompts_of,
    question,
    run,
)

SETTINGS = GenerationSettings(max_new_tokens=5)
SOFT = [START, PATCH, PATCH, END_OF_MEDIUM]


def medium(seed: int, weight: float = 1.0) -> Medium:
    drawn = torch.Generator().manual_seed(seed)
    return Medium("image", "", embedding=torch.randn(8, generator=drawn) * 3, weight=weight)


def asked(ids: list[int], *media: Medium) -> Question:
    return Question(prompt=TokenizedSample(ids, [], media))


def told(one: LocalEngine, turn: Question) -> list[int]:
    stream = Stream(one, turn, SETTINGS)
    shown = "".join(stream)
    assert isinstance(stream.result, Generated)
    assert stream.result.text == shown
    return [int(word) for word in shown.split()]


FIRST, SECOND = medium(1), medium(2)
TURN = [*SYSTEM, *SOFT, 30, 31, *SOFT, 32, 25]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox", "mistral", "gemma2", "bloom"])
def test_a_turn_reads_what_is_new(kind: str, reads: list[tuple[int, int]]) -> None:
    model = chatbind(kind)
    one = engine(model)
    answer = told(one, asked(TURN, FIRST, SECOND))
    assert prompts_of(reads) == [(1, len(TURN))]
    turn = asked([*TURN, *answer, 33, *SOFT, 34, 25], FIRST, SECOND, medium(3))
    del reads[:]
    found = told(one, turn)
    # the last token of the answer was never read
    assert prompts_of(reads) == [(1, 1 + 1 + len(SOFT) + 2)]
    assert found == told(engine(model), turn)
    # and a turn back
    del reads[:]
    assert told(one, asked(TURN, FIRST, SECOND)) == answer
    assert reads[0] == (1, 1)


@pytest.mark.parametrize(
    ("media", "read"),
    [
        ((FIRST, SECOND), 1),
        ((medium(1), medium(2)), 1),  # equal, be they the same objects or not
        ((FIRST, medium(3)), len(TURN) - TURN.index(32) + 3),
        ((FIRST, replace(SECOND, weight=0.5)), len(TURN) - TURN.index(32) + 3),
        ((medium(3), SECOND), len(TURN) - len(SYSTEM) - 1),
        ((replace(FIRST, weight=0.5), SECOND), len(TURN) - len(SYSTEM) - 1),
    ],
)
def test_other_media_are_read(
    media: tuple[Medium, ...], read: int, reads: list[tuple[int, int]]
) -> None:
    model = chatbind()
    one = engine(model)
    told(one, asked(TURN, FIRST, SECOND))
    del reads[:]
    answer = told(one, asked(TURN, *media))
    assert reads[0] == (1, read)
    assert answer == told(engine(model), asked(TURN, *media))


def test_an_answer_that_is_left_can_be_asked_again(reads: list[tuple[int, int]]) -> None:
    model = chatbind()
    one = engine(model)
    wanted = told(engine(model), asked(TURN, FIRST, SECOND))
    long = GenerationSettings(max_new_tokens=200)
    assert len("".join(Stream(engine(model), asked(TURN, FIRST, SECOND), long)).split()) == 200
    del reads[:]
    for _ in Stream(one, asked(TURN, FIRST, SECOND), long):
        break
    assert len(reads) < 150
    del reads[:]
    assert told(one, asked(TURN, FIRST, SECOND)) == wanted
    assert reads[0] == (1, 1)


def test_streams_beside_each_other_and_beside_a_batch_do_not_meet() -> None:
    model = chatbind()
    one = engine(model)
    others = [replace(question(n), settings=SETTINGS) for n in range(6)]
    wanted = [told(engine(model), turn) for turn in others]
    told(one, others[0])
    streams = [iter(Stream(one, turn, SETTINGS)) for turn in others]
    pieces = [[next(stream, "")] for stream in streams]
    outcomes = run(one, others)
    for stream, some in zip(streams, pieces, strict=True):
        some += stream
    assert [[int(w) for w in "".join(some).split()] for some in pieces] == wanted
    assert [outcomes[n].text for n in range(6)] == [  # type: ignore[union-attr]
        " ".join(map(str, words)) for words in wanted
    ]


def test_what_fails_is_not_gone_on_with() -> None:
    model = chatbind()
    one = engine(model)
    wanted = told(engine(model), asked(TURN, FIRST, SECOND))
    told(one, asked(TURN, FIRST, SECOND))
    broken = replace(FIRST, embedding=torch.full((8,), float("nan")))
    with pytest.raises(RecordError, match="not finite"):
        told(one, asked(TURN, broken, SECOND))
    forward = model.language_model.forward

    def fails(*args: Any, **kwargs: Any) -> Any:
        forward(*args, **kwargs)
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.language_model.forward = fails
    with pytest.raises(torch.OutOfMemoryError):
        told(one, asked(TURN, FIRST, SECOND))
    model.language_model.forward = forward
    assert told(one, asked(TURN, FIRST, SECOND)) == wanted
    with pytest.raises(ChatBindError, match="said"):
        one.answer(Question(problem=RecordError("said")), SETTINGS)


def test_what_keeps_more_than_keys_and_values_streams_through_generate(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = chatbind("lfm2")
    one = engine(model)
    turns = [replace(question(n), id=n) for n in range(3)]
    wanted = [alone(model, turn) for turn in turns]
    for turn, text in zip(turns, wanted, strict=True):
        stream = Stream(one, turn, SETTINGS)
        pieces = list(stream)
        assert "".join(pieces) == text
        assert len(pieces) > 1
    assert capsys.readouterr().err.count("in fixed batches") == 1

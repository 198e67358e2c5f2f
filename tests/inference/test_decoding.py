"""Tokens to text: ends, stop texts, and what may be shown before the answer is whole."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerFast

from chatbind_cli.data.tokens import TokenizedSample
from chatbind_cli.inference.asks import Ask
from chatbind_cli.inference.decoding import AnswerDecoder, Generated, GrowingText
from chatbind_cli.inference.fixed_batches import AnswerEnds
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.questions import Question
from tests.model.tiny import byte_tokenizer, word_tokenizer

END = 999


class Bytes:
    """A tokenizer whose tokens are single bytes; 256 is a special token."""

    def decode(self, ids: list[int], **_: object) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def decoder(*stops: str) -> AnswerDecoder:
    return AnswerDecoder(Bytes(), [END], stops)


@pytest.mark.parametrize(
    ("text", "tail", "stops", "wanted", "n_tokens", "ended"),
    [
        (" a dog ", [END, 1, 1], (), "a dog", 7, True),
        ("a dog", [], (), "a dog", 5, False),
        ("a dog### b", [], ("###",), "a dog", 8, True),
        ("a dog\nb##c", [END], ("##", "\n"), "a dog", 6, True),
        ("", [END], (), "", 0, True),
    ],
)
def test_an_answer_ends_at_the_first_end_token_or_stop_text(
    text: str, tail: list[int], stops: tuple[str, ...], wanted: str, n_tokens: int, ended: bool
) -> None:
    found = decoder(*stops).finished([*text.encode(), *tail])
    assert found == Generated(wanted, n_tokens, "stop" if ended else "length")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("  Zwölf Enten 🦆 <s> 日本\n \n\nmore", "Zwölf Enten 🦆 <s> 日本"),
        ("a # b ## c### d", "a # b ## c"),
        ("a ##", "a ##"),
    ],
)
def test_what_is_shown_early_is_never_taken_back_and_ends_as_the_whole_answer(
    text: str, wanted: str
) -> None:
    one = decoder("</s>", "\n\n", "###")
    ids = list(text.encode())
    growing = GrowingText(one)
    shown = [growing.safe(ids[:length]) for length in range(len(ids) + 1)]
    shown.append(one.finished(ids).text)
    for before, after in itertools.pairwise(shown):
        assert after.startswith(before)
    assert shown[-1] == wanted
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in shown)


def llama_tokenizer() -> Any:
    """As LLaMA's: characters that it does not know are written as bytes."""
    state = json.loads(word_tokenizer().backend_tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if "<0x" not in t["content"]]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("make", [byte_tokenizer, llama_tokenizer])
def test_real_tokenizers_show_characters_of_several_tokens_whole(make: Any) -> None:
    tokenizer = make()
    text = "What is this? Ein Kätzchen 🐈 mit 日本 im Sinn."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    one = AnswerDecoder(tokenizer, [END], ["###"])
    growing = GrowingText(one)
    shown = [growing.safe(ids[:length]) for length in range(1, len(ids) + 1)]
    assert all(text.startswith(piece) for piece in shown)
    assert one.finished(ids).text == text


def test_a_row_of_a_batch_stops_at_its_own_stop_text() -> None:
    prompt, settings = TokenizedSample([1, 2, 3], [], ()), GenerationSettings()
    asks = [Ask(Question(), prompt, settings, decoder("##"), room=20) for _ in range(3)]
    criterion = AnswerEnds(asks, 3)
    texts = [b"##.abcdefghijklmnop#", b"....bcdefghijklmno##", b"....##defghijklmnopq"]
    rows = [list(text) for text in texts]
    # the first has it in the prompt only; the last had it long ago, and is over since then
    assert criterion(torch.tensor(rows), torch.empty(0)).tolist() == [False, True, False]
    assert criterion(torch.tensor(rows)[:, :6], torch.empty(0)).tolist() == [False, False, True]


@pytest.mark.parametrize("make", [byte_tokenizer, llama_tokenizer])
def test_a_long_answer_grows_to_the_same_text_at_the_same_cost_for_each_token(make: Any) -> None:
    tokenizer = make()
    words = ["Kätzchen", "🐈", "日本日本日本日本日本", "dog", "  ", "\n", "this?"]
    text = " ".join(words[n * n % 7] for n in range(400))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded: list[int] = []

    class Counting:
        def decode(self, some: list[int], **how: Any) -> str:
            decoded.append(len(some))
            return str(tokenizer.decode(some, **how))

    one = AnswerDecoder(Counting(), [END], ["###"])
    growing = GrowingText(one)
    shown = [growing.safe(ids[:length]) for length in range(1, len(ids) + 1)]
    assert sum(decoded) < 50 * len(ids)
    whole = one.finished(ids).text
    assert len(ids) > 800
    assert shown[-1] == whole
    # a tokenizer may take back characters as long as more bytes of the same word come
    assert all(whole.startswith(piece) for piece in shown)
    assert len(set(map(len, shown))) > 100
    assert growing.safe([*ids, END, END, 5]) == whole


def test_half_characters_for_ever_are_decoded_in_stretches_too() -> None:
    growing = GrowingText(decoder())
    ids = [0xE6] * 5000
    assert {growing.safe(ids[:length]) for length in range(1, 5000)} == {""}
    assert growing._known > 4900

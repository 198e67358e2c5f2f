"""Tokenizers: added tokens, and text to ids as SentencePiece cuts it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from chatbind_cli.errors import CheckpointError
from chatbind_cli.model.tokenizer import (
    TextCodec,
    load_tokenizer,
    media_token_ids,
    prepare_tokenizer,
)
from tests.model.tiny import byte_tokenizer, word_tokenizer


def test_the_ids_of_v0_are_the_published_ones(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizer")
    before = len(tokenizer)
    prepare_tokenizer(tokenizer, pad_token="[PAD]")
    assert len(tokenizer) - before == 4
    assert tokenizer.pad_token_id == 32000
    assert list(media_token_ids(tokenizer).values()) == [32001, 32002, 32003]


def test_the_ids_of_v1_are_the_published_ones(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizer")
    before = len(tokenizer)
    prepare_tokenizer(tokenizer)
    assert len(tokenizer) - before == 3
    assert tokenizer.pad_token_id == 0
    assert list(media_token_ids(tokenizer).values()) == [32000, 32001, 32002]


def test_preparing_twice_adds_nothing() -> None:
    tokenizer = byte_tokenizer()
    prepare_tokenizer(tokenizer)
    ids = media_token_ids(tokenizer)
    before = len(tokenizer)
    prepare_tokenizer(tokenizer)
    assert len(tokenizer) - before == 0
    assert media_token_ids(tokenizer) == ids


def test_without_start_and_end_there_is_one_new_token() -> None:
    tokenizer = byte_tokenizer()
    before = len(tokenizer)
    prepare_tokenizer(tokenizer, use_start_end=False)
    assert len(tokenizer) - before == 1
    assert media_token_ids(tokenizer)["im_start_id"] is None


def test_the_codec_cuts_as_sentencepiece_does(shared_data: Path, tmp_path: Path) -> None:
    """SentencePiece itself is the oracle; the saved folder must cut the same way."""
    source = shared_data / "tokenizer"
    oracle = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    tokenizer = load_tokenizer(source)
    prepare_tokenizer(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    codec, again = TextCodec(tokenizer), TextCodec(AutoTokenizer.from_pretrained(tmp_path))
    assert codec.bos == again.bos == [1]
    pick = random.Random(0)
    alphabet = [
        *"ab \n\té你🐦#:<>/s.0▁",
        "the ",
        "  ",
        " " * 17,
        "</s>",
        "<s>",
        "<im_patch>",
        "<0x0A>",
    ]
    texts = ["".join(pick.choices(alphabet, k=pick.randint(1, 40))) for _ in range(500)]
    for text in [*texts, *(" " * count + "x" for count in range(1, 70))]:
        assert codec.plain(text, at_start=True) == oracle.encode(text), repr(text)
        assert again.plain(text, at_start=True) == oracle.encode(text), repr(text)


def test_a_bare_sentencepiece_file_gets_its_own_merge_order(
    shared_data: Path, tmp_path: Path
) -> None:
    """The reason for `_with_scored_merges`: if transformers mends its own, it can go."""
    shutil.copy(shared_data / "tokenizer" / "tokenizer.model", tmp_path)
    ours = load_tokenizer(tmp_path)
    assert ours.tokenize("a  b") == ["▁a", "▁", "▁b"]
    assert LlamaTokenizer.from_pretrained(str(tmp_path)).tokenize("a  b") == ["▁a", "▁▁", "b"]


@pytest.mark.parametrize("make", [byte_tokenizer, word_tokenizer])
def test_control_tokens_in_plain_text_are_just_letters(
    make: Callable[[], PreTrainedTokenizerFast],
) -> None:
    tokenizer = make()
    prepare_tokenizer(tokenizer)
    codec = TextCodec(tokenizer)
    text = "<im_patch><im_start> </s> <|im_end|> <|endoftext|>"
    ids = codec.plain(text, at_start=True)
    assert not set(ids) & set(tokenizer.all_special_ids)
    if make is byte_tokenizer:  # the other has no letter x, and spells it as a byte
        assert tokenizer.decode(ids) == text


def test_control_tokens_of_a_template_count() -> None:
    tokenizer = byte_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert TextCodec(tokenizer).control("<|im_end|>\n", at_start=False)[0] == end


def test_a_text_that_was_met_before_has_the_same_ids() -> None:
    codec = TextCodec(byte_tokenizer())
    text = "<|im_end|> a"
    read = [codec.plain(text, at_start=False), codec.control(text, at_start=False)]
    assert read[0] != read[1]
    for ids in read:
        ids.append(0)  # the caller's own
    again = [codec.plain(text, at_start=False), codec.control(text, at_start=False)]
    assert again == [ids[:-1] for ids in read]


def test_a_word_tokenizer_marks_the_start_and_a_byte_one_does_not() -> None:
    word, byte = TextCodec(word_tokenizer()), TextCodec(byte_tokenizer())
    assert (word.marks_start, byte.marks_start) == (True, False)
    assert word.plain("the", at_start=True) == word.plain(" the", at_start=False)
    assert byte.plain("the", at_start=True) == byte.plain("the", at_start=False)
    assert word.bos == [1]
    assert byte.bos == []


def test_a_tokenizer_that_puts_a_token_before_texts_keeps_doing_so() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert TextCodec(tokenizer).bos == [1]


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_a_broken_sentencepiece_file_is_named(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_of_text_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(CheckpointError, match="no end-of-text token"):
        TextCodec(tokenizer)

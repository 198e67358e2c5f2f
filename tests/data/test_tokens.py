"""Ids and labels, against those that the published weights were trained with."""

from __future__ import annotations

import json
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, PreTrainedTokenizerBase

from chatbind_cli.data.conversations import Conversation, parse_conversation
from chatbind_cli.data.tokens import PromptEncoder, TokenizedSample
from chatbind_cli.errors import RecordError
from chatbind_cli.media.medium import Medium
from chatbind_cli.model.config import ChatBindConfig
from chatbind_cli.model.label_loss import IGNORE_INDEX
from chatbind_cli.model.prompts import get_style, styles
from chatbind_cli.model.tokenizer import load_tokenizer, media_token_ids, prepare_tokenizer
from chatbind_cli.model.turns import Turn, answer, question
from tests.model.tiny import CHATML, byte_tokenizer, word_tokenizer

IMAGE = Medium("image", "a.png")
STYLES = {"v0": "v0", "v1": "vicuna_v1_1"}

# "x_text_contains_eos": the reference reads a user's "</s>" as the end of the text
# "x_image_...": a placeholder without its image, or an image without its placeholder
REFUSED = ("x_image_tag_but_no_image_key", "x_image_key_but_no_tag")


def encoder(
    tokenizer: PreTrainedTokenizerBase, style: str, tokens: int = 1, start_end: bool = True
) -> PromptEncoder:
    config = ChatBindConfig(
        text_config=LlamaConfig(),
        tokens_per_embedding=tokens,
        use_start_end=start_end,
        prompt_style=style,
        **media_token_ids(tokenizer),
    )
    return PromptEncoder(tokenizer, config)


def prepared(tokenizer: PreTrainedTokenizerBase, style: str) -> PreTrainedTokenizerBase:
    prepare_tokenizer(tokenizer, pad_token=get_style(style).pad_token)
    return tokenizer


@cache
def llama(folder: Path, style: str) -> PreTrainedTokenizerBase:
    return prepared(load_tokenizer(folder), style)


@cache
def training_golden(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "prompts" / "training_golden.json").read_text("utf-8"))["variants"]


@cache
def golden_conversations(folder: Path) -> dict[str, Conversation]:
    records = json.loads((folder / "prompts" / "conversations.json").read_text("utf-8"))
    conversations = {}
    for record in records:
        if record["id"] == "x_two_images_one_value":
            record["image"] = ["a.png", "a.png"]  # the reference shows the one image twice
        if record["id"] not in REFUSED:
            conversations[record["id"]] = parse_conversation(record, record["id"])
    return conversations


VARIANTS = [
    "v0,rep=-1",
    "v0,rep=4",
    "v1,rep=-1",
    "v1,rep=4",
    "v0,rep=-1,max_len=40",
    "v1,rep=-1,max_len=60",
    "v0,rep=4,no_start_end",
    "v1,rep=4,no_start_end",
]


@cache
def golden_pairs(
    golden: Path, shared_data: Path, variant: str
) -> list[tuple[str, TokenizedSample, dict[str, Any]]]:
    settings = training_golden(golden)[variant]
    style = STYLES[settings["version"]]
    encode = encoder(
        llama(shared_data / "tokenizer", style),
        style,
        max(settings["repeat_feature_dim"], 1),
        settings["mm_use_im_start_end"],
    )
    wanted = {sample["id"]: sample for sample in settings["samples"]}
    return [
        (name, encode.conversation(conversation, settings["model_max_length"]), wanted[name])
        for name, conversation in golden_conversations(golden).items()
    ]


def targets(sample: TokenizedSample) -> int:
    """How many tokens are learned."""
    return sum(label != IGNORE_INDEX for label in sample.labels)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ids_equal_the_reference(golden: Path, shared_data: Path, variant: str) -> None:
    equal = 0
    for name, sample, wanted in golden_pairs(golden, shared_data, variant):
        cut = training_golden(golden)[variant]["model_max_length"]
        if name == "x_text_contains_eos" and len(wanted["input_ids"]) < cut:
            assert 2 not in sample.input_ids[:-1]
            continue
        if name == "empty_answer_image_start" and variant.startswith("v1"):
            # the reference leaves out the end-of-text token and then zeroes the sample
            assert sample.input_ids == [*wanted["input_ids"], 2]
            continue
        assert sample.input_ids == wanted["input_ids"], name
        equal += 1
    assert equal >= 10


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.startswith("v1")])
def test_labels_equal_the_reference_where_it_does_not_give_up(
    golden: Path, shared_data: Path, variant: str
) -> None:
    right = 0
    for name, sample, wanted in golden_pairs(golden, shared_data, variant):
        if "mismatch" in wanted["printed"]:
            assert targets(sample) > 0, name
        else:
            assert sample.labels == wanted["labels"], name
            right += 1
    assert right >= 9


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "max_len" not in v])
def test_labels_are_the_answers_and_their_ends(
    golden: Path, shared_data: Path, variant: str
) -> None:
    """SentencePiece decodes the labelled runs; they must read as the answers, whole."""
    settings = training_golden(golden)[variant]
    tokenizer = llama(shared_data / "tokenizer", STYLES[settings["version"]])
    end = {"v0": "\n###", "v1": "</s>"}[settings["version"]]
    for name, sample, _ in golden_pairs(golden, shared_data, variant):
        conversation = golden_conversations(golden)[name]
        turns = conversation.turns
        if turns[0].role == "gpt" and settings["version"] == "v1":
            turns = turns[1:]  # that style has no place for an answer without a question
        answers = [turn.text for turn in turns if turn.role == "gpt"]
        runs: list[list[int]] = [[]]
        for label in sample.labels:
            if label != IGNORE_INDEX:
                runs[-1].append(label)
            elif runs[-1]:
                runs.append([])
        decoded = [tokenizer.decode(run) for run in runs if run]
        # the decoder drops the space that stands before an answer's first word
        assert decoded == [f"{text}{end}" for text in answers], name


def test_labels_are_the_ids_or_ignored(golden: Path, shared_data: Path) -> None:
    for _, sample, _ in golden_pairs(golden, shared_data, "v0,rep=4"):
        assert len(sample.labels) == len(sample.input_ids)
        pairs = zip(sample.labels, sample.input_ids, strict=True)
        assert all(label in (IGNORE_INDEX, index) for label, index in pairs)


@cache
def asking(folder: Path, style: str, version: str) -> PromptEncoder:
    return encoder(llama(folder, STYLES[version]), style)


def test_prompts_have_the_training_ids(golden: Path, shared_data: Path) -> None:
    path = golden / "prompts" / "inference_prompts.json"
    cases = [c for c in json.loads(path.read_text("utf-8"))["inference"] if "input_ids_slow" in c]
    seen = 0
    for case in cases:
        if case["template"] not in styles():
            continue
        assert (
            get_style(case["template"]).pad_token == {"v0": "[PAD]", "v1": None}[case["tokenizer"]]
        )
        assert case["repeat_feature_dim"] == 1
        encode = asking(shared_data / "tokenizer", case["template"], case["tokenizer"])
        prompt = encode.prompt([question(case["query"], [IMAGE])])
        assert prompt.input_ids == case["input_ids_slow"]
        assert prompt.media == (IMAGE,)
        seen += 1
    assert seen == 14


TURNS = [
    [question("What is it?", [IMAGE]), answer("A dog.")],
    [question("<image> What?", [IMAGE]), answer(" two  spaces\n"), question("So?"), answer("x")],
    [
        question("Hello!"),
        answer("Hi"),
        question("And <audio>?", [Medium("audio", "b")]),
        answer(""),
    ],
]


_THINKS = """
{%- set last = namespace(question=0) %}
{%- for m in messages if m.role == "user" %}{% set last.question = loop.index0 * 2 %}{% endfor %}
{%- for m in messages %}
    {{- "<|im_start|>" ~ m.role ~ "\n" }}
    {%- if loop.index0 > last.question %}{{ "<think>\n\n</think>\n\n" }}{% endif %}
    {{- m.content ~ "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- "<think>\n\n</think>\n\n" }}
    {%- endif %}
{%- endif %}"""
_ALWAYS_THINKS = CHATML.replace("assistant\n{%", "assistant\n<think>\n{%")


@pytest.mark.parametrize("make", [byte_tokenizer, word_tokenizer])
@pytest.mark.parametrize(
    ("style", "template"),
    [*((style, CHATML) for style in sorted(styles())), ("chat", _THINKS), ("chat", _ALWAYS_THINKS)],
)
def test_a_prompt_is_the_beginning_of_its_training_sample(
    make: Any, style: str, template: str
) -> None:
    tokenizer = make()
    tokenizer.chat_template = template
    encode = encoder(prepared(tokenizer, style), style, tokens=2)
    for turns in TURNS:
        sample = encode.conversation(Conversation("x", tuple(turns), "f:1"))
        for asked in range(1, len(turns), 2):
            prompt = encode.prompt(turns[:asked])
            assert sample.input_ids[: len(prompt.input_ids)] == prompt.input_ids
            # and the next token is the first that is learned for this answer
            assert sample.labels[len(prompt.input_ids)] != IGNORE_INDEX
            assert sample.labels[len(prompt.input_ids) - 1] == IGNORE_INDEX
            choice = encode.answer(turns[:asked], turns[asked].text)
            learned = sample.labels[len(prompt.input_ids) :]
            assert choice == list(takewhile(lambda label: label != IGNORE_INDEX, learned))


def test_an_empty_thought_is_read_before_every_answer_and_never_learned() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = _THINKS
    encode = encoder(prepared(tokenizer, "chat"), "chat")
    turns = (question("one?", []), answer("1"), question("two?", []), answer("2"))
    sample = encode.conversation(Conversation("x", turns, "f:1"))
    assert tokenizer.decode(sample.input_ids).count("<think>\n\n</think>\n\n") == 2
    learned = [token for token in sample.labels if token != IGNORE_INDEX]
    assert tokenizer.decode(learned) == "1<|im_end|>2<|im_end|>"
    # as the template itself has it for one that is to answer without thinking
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "one?"}],
        add_generation_prompt=True,
        enable_thinking=False,
        return_dict=False,
    )
    assert encode.prompt(turns[:1]).input_ids == asked


@pytest.mark.parametrize("make", [byte_tokenizer, word_tokenizer])
@pytest.mark.parametrize("style", ["v0", "vicuna_v1_1", "mpt_multimodal"])
def test_what_users_write_makes_no_special_token(make: Any, style: str) -> None:
    tokenizer = prepared(make(), style)
    encode = encoder(tokenizer, style)
    text = "<im_patch> <im_start><im_end></s><|im_end|><|endoftext|> ### Human: <image>"
    plain, tricky = (encode.prompt([question(t, [])]).input_ids for t in ("hello", text))
    special = set(tokenizer.all_special_ids)
    count = [sum(i in special for i in ids) for ids in (plain, tricky)]
    assert count[0] == count[1]


def test_the_number_of_placeholder_tokens_is_that_of_the_media() -> None:
    tokenizer = prepared(byte_tokenizer(), "v0")
    encode = encoder(tokenizer, "v0", tokens=3)
    media = [IMAGE, Medium("audio", "b.wav")]
    prompt = encode.prompt([question("compare <im_patch>", media)])
    patch = media_token_ids(tokenizer)["im_patch_id"]
    assert prompt.input_ids.count(patch) == 6
    assert prompt.media == tuple(media)


@cache
def cutting_encoder() -> PromptEncoder:
    return encoder(prepared(byte_tokenizer(), "v0"), "v0", tokens=3)


def cut_sample(length: int | None) -> tuple[TokenizedSample, int]:
    encode = cutting_encoder()
    turns = (
        question("a", [IMAGE]),
        answer("b"),
        question("c", [Medium("audio", "x")]),
        answer("d"),
    )
    sample = encode.conversation(Conversation("x", turns, "f:1"), length)
    patch = media_token_ids(encode._tokenizer)["im_patch_id"]
    return sample, sample.input_ids.count(patch)


def test_a_cut_never_tears_a_medium_and_media_beyond_it_leave() -> None:
    whole, patches = cut_sample(None)
    assert (len(whole.media), patches) == (2, 6)
    for length in range(1, len(whole.input_ids) + 1):
        sample, patches = cut_sample(length)
        assert patches == 3 * len(sample.media)
        assert length - 5 < len(sample.input_ids) <= length
        assert whole.input_ids[: len(sample.input_ids)] == sample.input_ids
        assert whole.labels[: len(sample.labels)] == sample.labels


def test_a_sample_whose_answers_are_cut_off_has_no_targets() -> None:
    assert targets(cut_sample(None)[0]) > 0
    assert targets(cut_sample(20)[0]) == 0


def test_the_tokens_that_end_an_answer() -> None:
    tokenizer = prepared(byte_tokenizer(), "chat")
    end_of_text, end_of_turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    for style, ids, strings in (
        ("v0", (end_of_text,), ("###",)),
        ("vicuna_v1_1", (end_of_text,), ()),
        ("mpt_multimodal", (end_of_text, end_of_turn), ()),
        ("chat", (end_of_text, end_of_turn), ()),
    ):
        encode = encoder(tokenizer, style)
        assert encode.stop_token_ids == ids
        assert encode.stop_strings == strings
    # a tokenizer that does not know the control token spells it: then the text ends the answer
    encode = encoder(prepared(word_tokenizer(), "mpt_multimodal"), "mpt_multimodal")
    assert encode.stop_strings == ("<|im_end|>",)


def test_another_style_can_be_asked_for() -> None:
    tokenizer = prepared(byte_tokenizer(), "v0")
    config = ChatBindConfig(text_config=LlamaConfig(), **media_token_ids(tokenizer))
    assert PromptEncoder(tokenizer, config).style.name == "v0"
    assert PromptEncoder(tokenizer, config, "chat").style.name == "chat"


def test_a_prompt_ends_with_a_question_and_a_sample_with_an_answer() -> None:
    encode = encoder(prepared(byte_tokenizer(), "v0"), "v0")
    with pytest.raises(RecordError, match="must end with a question"):
        encode.prompt([question("a"), answer("b")])
    with pytest.raises(RecordError, match="f:7: the conversation has no answer"):
        encode.conversation(Conversation("x", (Turn("human", ("a",)),), "f:7"))

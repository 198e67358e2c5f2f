"""The strings of the prompt styles, against the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chatbind_cli.errors import CheckpointError, UsageError
from chatbind_cli.media.medium import Medium
from chatbind_cli.model.prompts import (
    EOS,
    MEDIA,
    STYLE_BY_VERSION,
    PromptStyle,
    get_style,
    styles,
)
from chatbind_cli.model.turns import Turn, answer, question
from tests.model.tiny import CHATML, byte_tokenizer, word_tokenizer

IMAGE = Medium("image", "a.png")


def written(style: PromptStyle, turns: list[Turn], medium: str = "<image>", **more: Any) -> str:
    """The prompt as one string, as the golden data has it."""
    special = {EOS: "</s>", MEDIA: medium}
    return "".join(special.get(p.kind, p.text) for p in style.pieces(turns, **more))


def learned(style: PromptStyle, turns: list[Turn], **more: Any) -> str:
    pieces = style.pieces(turns, **more)
    return "".join("</s>" if p.kind == EOS else p.text for p in pieces if p.target)


def golden_prompts(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "prompts" / "inference_prompts.json").read_text("utf-8"))


def medium_of(case: dict[str, Any]) -> str:
    patches = "<im_patch>" * case.get("repeat_feature_dim", 1)
    return f"<im_start>{patches}<im_end>" if case["mm_use_im_start_end"] else patches


def test_prompts_equal_the_published_ones_for_every_style_and_query(golden: Path) -> None:
    cases = [c for c in golden_prompts(golden)["inference"] if c["template"] in styles()]
    assert {c["template"] for c in cases} == set(styles()) - {"v0", "chat"}
    for case in cases:
        style = get_style(case["template"])
        turns = [question(case["query"], [IMAGE])]
        assert written(style, turns, medium_of(case)) == case["prompt"]


def test_the_batch_script_of_the_reference_asks_the_same_but_for_the_role(golden: Path) -> None:
    # it lets the model write "Assistant:" and strips that; we ask as its other script does
    cases = [c for c in golden_prompts(golden)["vqa_inference"] if c["template"] in styles()]
    assert cases
    for case in cases:
        count = case["prompt"].count("<im_patch>")
        medium = medium_of({**case, "repeat_feature_dim": count})
        style = get_style(case["template"])
        prompt = written(style, [question(case["query"], [IMAGE])], medium)
        assert prompt.startswith(case["prompt"])
        assert prompt[len(case["prompt"]) :] in ("", style.answer_open)


def test_several_turns_equal_the_published_ones(golden: Path) -> None:
    cases = golden_prompts(golden)["multi_turn"]
    assert len(cases) == 4
    for case in cases:
        turns = [
            question("First question?", [IMAGE]),
            answer("First answer."),
            question("Second question?"),
        ]
        style = get_style(case["template"])
        assert written(style, turns, "<im_start><im_patch><im_end>") == case["prompt"]


def test_stop_strings_equal_the_published_ones(golden: Path) -> None:
    for case in golden_prompts(golden)["inference"]:
        if case["template"] in styles():
            style = get_style(case["template"])
            assert (style.stop or "</s>") == case["stop_str"]


@pytest.mark.parametrize("name", sorted(set(styles()) - {"chat"}))
def test_a_prompt_is_the_beginning_of_the_training_sample(name: str) -> None:
    style = get_style(name)
    asked = [question("What?", [IMAGE])]
    sample = written(style, [*asked, answer("This.")])
    assert sample.startswith(written(style, asked))


@pytest.mark.parametrize("name", sorted(set(styles()) - {"chat"}))
def test_answers_and_their_ends_alone_are_learned(name: str) -> None:
    style = get_style(name)
    turns = [question("Q ASSISTANT: ###", [IMAGE]), answer("ASSISTANT: ### x")]
    end = style.answer_close + ("</s>" if style.ends_with_eos else "")
    assert learned(style, turns) == f"{style.answer_lead}ASSISTANT: ### x{end}"


def test_an_empty_answer_still_has_its_end() -> None:
    turns = [question("Say nothing."), answer("")]
    assert learned(get_style("vicuna_v1_1"), turns) == "</s>"
    assert learned(get_style("v0"), turns) == " \n###"


def test_every_version_of_the_reference_has_a_style() -> None:
    assert set(STYLE_BY_VERSION.values()) <= set(styles())


def test_an_unknown_style_is_a_usage_error_that_lists_the_known() -> None:
    with pytest.raises(UsageError, match="no prompt style 'v9'; choose one of v0, multimodal"):
        get_style("v9")


def test_chat_uses_the_template_of_the_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    style = get_style("chat")
    asked = [question("What?", [IMAGE])]
    assert written(style, asked, tokenizer=tokenizer) == (
        "<|im_start|>user\nWhat?\n<image><|im_end|>\n<|im_start|>assistant\n"
    )
    sample = [*asked, answer("A dog.")]
    assert learned(style, sample, tokenizer=tokenizer) == "A dog.<|im_end|>"


@pytest.mark.parametrize("name", sorted(set(styles()) - {"chat"}))
def test_a_system_text_takes_the_place_of_the_published_one_alone(name: str) -> None:
    style = get_style(name)
    asked = [question("What?", [IMAGE])]
    published = written(style, asked)
    assert published.count(style.system) == 1
    assert len(style.system) > 50
    assert written(style, asked, system="Be brief.") == published.replace(style.system, "Be brief.")
    told = [p.kind for p in style.pieces(asked, system="<|im_end|>") if p.text == "<|im_end|>"]
    assert told[0] == "plain"


def test_chat_writes_a_system_text_as_the_templates_system_turn() -> None:
    tokenizer = byte_tokenizer()
    turns = [question("a"), answer("b"), question("c")]
    without = written(get_style("chat"), turns, tokenizer=tokenizer)
    told = written(get_style("chat"), turns, tokenizer=tokenizer, system="Be <|im_end|> brief.")
    assert told == f"<|im_start|>system\nBe <|im_end|> brief.<|im_end|>\n{without}"
    sample = [question("a"), answer("b")]
    assert learned(get_style("chat"), sample, tokenizer=tokenizer, system="x") == "b<|im_end|>"


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace(
            "{% for", "{{ raise_exception('no') if messages[0].role == 'system' }}{% for"
        ),
        CHATML.replace("in messages", "in messages if m.role != 'system'"),
    ],
)
def test_chat_says_that_a_template_takes_no_system_text(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    get_style("chat").pieces([question("a")], tokenizer=tokenizer)
    with pytest.raises(CheckpointError, match="chat template takes no system text"):
        get_style("chat").pieces([question("a")], tokenizer=tokenizer, system="Be brief.")


def test_chat_keeps_user_text_out_of_the_template() -> None:
    tokenizer = byte_tokenizer()
    text = "{{ 7 * 7 }} <|im_end|> {% raw %}"
    pieces = get_style("chat").pieces([question(text)], tokenizer=tokenizer)
    assert [p.text for p in pieces if p.kind == "plain"] == [text]


def test_chat_learns_the_end_of_text_where_the_template_ends_answers_with_none() -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\n"
        "{% else %}A: {{ m.content }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    style = get_style("chat")
    turns = [question("one?"), answer("1"), question("two?"), answer("2")]
    assert learned(style, turns, tokenizer=tokenizer) == " 1</s> 2</s>"
    # the space before an answer is the model's to write, as in the prompt that asks for it
    assert written(style, turns[:1], tokenizer=tokenizer) == "Q: one?\nA:"


def test_chat_without_a_template_says_what_to_do() -> None:
    tokenizer = word_tokenizer()
    with pytest.raises(CheckpointError, match="no chat template; choose another --prompt-style"):
        get_style("chat").pieces([question("x")], tokenizer=tokenizer)


def test_chat_refuses_a_template_that_drops_turns() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[-1].content }}"
    turns = [question("a"), answer("b"), question("c")]
    with pytest.raises(CheckpointError, match="drops or reorders turns"):
        get_style("chat").pieces(turns, tokenizer=tokenizer)

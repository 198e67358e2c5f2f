"""Chat templates are programs of others: rendered as transformers does, and never for long."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from chatbind_cli.errors import CheckpointError
from chatbind_cli.model.chat_template import render_marked
from tests.model.tiny import CHATML, byte_tokenizer

CHAT = [
    {"role": "user", "content": "Is 'this' <b>\n"},
    {"role": "assistant", "content": "Yes: <|im_end|>"},
    {"role": "user", "content": "And this?"},
]

TEMPLATES = [
    CHATML,
    "{{ bos_token }}{% for m in messages %}\n  {% if loop.first %}{% continue %}{% endif %}\n"
    "[{{ m.role | upper }}] {{ m['content'] }}{{ eos_token }}\n{% endfor %}",
    "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}"
    "{{ ns.n }}:{{ m.content }}{%- generation -%} {{ m.role }} {%- endgeneration -%}{%- endfor -%}",
    "{% for m in messages %}{{ m.content }}{% endfor %}{{ enable_thinking, strftime_now('%%') }}",
    "{% for m in messages %}{{ m.content }}{% if not tools and documents is none %}|{% endif %}"
    "{% endfor %}{{ dict(a=1) | tojson }}{{ ('<é>' ~ 1) | tojson(indent=2) }}",
]


def render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    text, marks = render_marked(tokenizer, [message["role"] for message in messages])
    for mark, message in zip(marks, messages, strict=True):
        text = text.replace(mark, message["content"])
    return text


def holder(template: Any) -> Any:
    return SimpleNamespace(chat_template=template, special_tokens_map={}, name_or_path="lm")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("turns", [2, 3])
def test_it_renders_as_transformers_does(template: str, turns: int) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    expected = tokenizer.apply_chat_template(CHAT[:turns], tokenize=False, enable_thinking=False)
    assert render(tokenizer, CHAT[:turns]) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ 'a' | center(10**10) }}",
        "{{ ('x' * 10**5) | replace('x', 'y' * 10**5) }}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{{ '" + "a" * 5_000_000 + "' }}",
        "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
        "{{ raise_exception('no\nsystem message') }}",
        "{{ messages.__class__.__mro__ }}{{ namespace(__class__=1) }}",
        "{% for",
        ["no", "text"],
        None,
    ],
)
def test_a_hostile_template_is_one_line_within_seconds(template: Any) -> None:
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="lm: the .*chat template") as caught:
        render_marked(holder(template), ["user"])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert time.monotonic() - start < 40  # two seconds of a processor that others use, too


def test_one_rendering_serves_every_conversation_of_the_same_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = holder("{% for m in messages %}[{{ m.content }}]{% endfor %}once")
    assert render(tokenizer, CHAT[:1]) == "[Is 'this' <b>\n]once"

    def start(*args: object, **kwargs: object) -> None:
        raise AssertionError("a second process for the same turns")

    monkeypatch.setattr("subprocess.run", start)
    assert render(tokenizer, CHAT[2:]) == "[And this?]once"


def test_every_day_is_the_same_day() -> None:
    tokenizer = holder("{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}")
    assert render(tokenizer, CHAT[2:]) == "26 Jul 2024: And this?"

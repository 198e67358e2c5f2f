"""What a judge is asked to do: our own rules, or a file of the seed's form.

A rule file is one JSON object: `{category: {"role": "Assistant", "prompt": "..."}}`, with
`default` for every category that it does not name. Our own rules are put together from the
category (what a good answer is) and the modality (what the answer is about). Knows nothing of
how the prompt around a rule looks (`prompts`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from chatbind_cli.errors import RecordError

_LARGEST = 1 << 20
_SUBJECTS = {
    "image": "a picture",
    "video": "a video",
    "audio": "a sound recording",
    "depth": "a depth map, in which each value is a distance",
    "thermal": "a thermal picture, in which each value is a temperature",
    "imu": "a recording of motion (accelerometer and gyroscope)",
}

_QUALITIES = {
    "conv": (
        "The question asks for facts. Above all an answer must be correct and must answer what "
        "was asked; a short correct answer is better than a long one with a mistake in it."
    ),
    "detail": (
        "The question asks for a description. A good one names what is there, where and how it "
        "is, leaves out nothing important, and mentions nothing that is not there."
    ),
    "complex": (
        "The question asks for reasoning. A good answer starts from what is really there, draws "
        "conclusions that follow, gives its reasons, and says so where it can only suppose."
    ),
}
_ANY_QUALITY = (
    "Judge how correct, relevant, helpful and complete each answer is, and how clearly it is said."
)
_TASK = (
    "Two assistants answered the question above. Rate each answer on a scale of 1 to 10, where 10 "
    "is the best. Length alone earns nothing, and the order of the answers means nothing."
)
_FORM = (
    "Write exactly two numbers on the first line, separated by one space: the score of Assistant 1 "
    "and the score of Assistant 2. On the lines after it, explain both scores."
)
_CONTEXT = (
    "You cannot perceive it yourself; what is written under [Context] was observed there by people "
    "and is true, though not complete. Boxes of objects are given as (x1, y1, x2, y2), from the "
    "top left corner to the bottom right one, as fractions of the width and the height."
)


@dataclass(frozen=True, slots=True)
class Rule:
    """One instruction to a judge.

    Attributes:
        role: what the two parties are called in the prompt: "Assistant" gives `[Assistant 1]`.
        prompt: what the judge is to do; it stands last in the prompt.
    """

    role: str
    prompt: str

    @property
    def fingerprint(self) -> str:
        """A short hash that changes with the words of the rule."""
        return hashlib.sha256(f"{self.role}\0{self.prompt}".encode()).hexdigest()[:12]


def own_rule(category: str, modality: str | None, *, with_context: bool) -> Rule:
    """Our own rule for a question.

    Args:
        category: `conv`, `detail`, `complex`, or any other word.
        modality: what the question is about, None for plain text.
        with_context: whether the prompt carries captions or boxes.
    """
    parts = [_TASK]
    if modality is not None:
        parts.append(f"The question is about {_SUBJECTS.get(modality, f'a file ({modality})')}.")
        if with_context:
            parts.append(_CONTEXT)
    parts += [_QUALITIES.get(category, _ANY_QUALITY), _FORM]
    return Rule("Assistant", "\n".join(parts))


class Rules:
    """Finds the rule for a question: in the user's file if there is one, else our own."""

    def __init__(self, table: Mapping[str, Rule] | None = None, *, source: str = "") -> None:
        self._table = table
        self._source = source

    def find(self, category: str, modality: str | None, *, with_context: bool) -> Rule:
        """The rule for one question.

        Raises:
            RecordError: the user's file has neither this category nor `default`.
        """
        if self._table is None:
            return own_rule(category, modality, with_context=with_context)
        rule = self._table.get(category) or self._table.get("default")
        if rule is None:
            raise RecordError(
                f"no rule for category {category!r}, and no `default`",
                where=self._source,
                hint=f"it has {', '.join(self._table)}",
            )
        return rule


def load_rules(path: Path) -> Rules:
    """Reads a rule file.

    Raises:
        RecordError: it is not JSON of the form in the module's docstring.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise RecordError(f"is larger than {_LARGEST >> 20} MiB", where=str(path))
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"is not a JSON rule file ({error})", where=str(path)) from error
    except OSError as error:
        raise RecordError(error.strerror or "cannot be read", where=str(path)) from error
    if not isinstance(value, dict) or not value:
        raise RecordError('must be {"category": {"role", "prompt"}}', where=str(path))
    table = {}
    for category, entry in value.items():
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise RecordError(f"category {category!r} has no prompt", where=str(path))
        table[category] = Rule(str(entry.get("role", "Assistant")), prompt)
    return Rules(table, source=str(path))

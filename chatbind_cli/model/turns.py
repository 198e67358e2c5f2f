"""What a conversation is made of: turns, whose content is text with media between the words.

Media stay names here. A placeholder in a user's text becomes a `Medium` once, when the record or
question is read; from then on no text is ever searched again, so a user may write `<image>` or
`###` without harm.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from chatbind_cli.errors import RecordError
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.modality import MODALITIES

HUMAN = "human"
GPT = "gpt"

_PLACEHOLDER = re.compile("<(" + "|".join(MODALITIES) + ")>")


Content = tuple[str | Medium, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says.

    Args:
        role: `human` or `gpt`.
        content: text and media in the order in which the language model reads them.
    """

    role: str
    content: Content

    @property
    def media(self) -> tuple[Medium, ...]:
        """The media of this turn, in order."""
        return tuple(part for part in self.content if isinstance(part, Medium))

    @property
    def text(self) -> str:
        """The turn as one string, with a placeholder such as `<image>` for each medium."""
        parts = (f"<{p.modality or 'media'}>" if isinstance(p, Medium) else p for p in self.content)
        return "".join(parts)


def placeholders(text: str) -> list[str]:
    """The modalities of the placeholders in a text, in order."""
    return _PLACEHOLDER.findall(text) if "<" in text else []


def place_media(text: str, media: Iterable[Medium]) -> tuple[Content, list[Medium]]:
    """Puts media where their placeholders stand.

    A placeholder whose modality has no medium left stays the plain text that it is.

    Returns:
        The content, and the media for which there was no placeholder, in their order.
    """
    waiting = list(media)
    if not waiting:
        return ((text,) if text else ()), waiting
    content: list[str | Medium] = []
    position = 0
    for match in _PLACEHOLDER.finditer(text):
        index = next((i for i, m in enumerate(waiting) if m.modality == match[1]), None)
        if index is None:
            continue
        if match.start() > position:
            content.append(text[position : match.start()])
        content.append(waiting.pop(index))
        position = match.end()
    if position < len(text):
        content.append(text[position:])
    return tuple(content), waiting


def question(text: str, media: Sequence[Medium] = (), *, where: str | None = None) -> Turn:
    """The turn of somebody who asks something about media.

    Placeholders in the text say where media go; media without one follow the question, each on a
    line of its own, as the published scripts place them. With no medium of a modality attached,
    the text `<audio>` is just text.

    Raises:
        RecordError: there are more placeholders of a modality than media of it (and at least one).
    """
    _check_placeholders(text, media, where)
    content, rest = place_media(text, media)
    tail: list[str | Medium] = []
    for medium in rest:
        if content or tail:
            tail.append("\n")
        tail.append(medium)
    return Turn(HUMAN, content + tuple(tail))


def dialogue(
    said: Sequence[tuple[str, str]],
    text: str,
    media: Sequence[Medium] = (),
    *,
    where: str | None = None,
) -> list[Turn]:
    """The turns of a question and of what was said before it.

    Media go to the placeholders of the turns in order; the question has what is left.

    Args:
        said: roles and texts of the earlier turns.
        text: the question's.
        media: what all of it is about.
        where: what an error message calls it.

    Raises:
        RecordError: there are more placeholders of a modality than media of it (and at least one).
    """
    asked = [words for role, words in said if role == HUMAN]
    _check_placeholders("\n".join([*asked, text]), media, where)
    turns, rest = turns_of(said, media)
    return [*turns, question(text, rest, where=where)]


def turns_of(
    said: Iterable[tuple[str, str]], media: Iterable[Medium]
) -> tuple[list[Turn], list[Medium]]:
    """The turns of roles and texts with media in them, and the media that have no placeholder."""
    turns, waiting = [], list(media)
    for role, words in said:
        if role == HUMAN:
            content, waiting = place_media(words, waiting)
            turns.append(Turn(HUMAN, content))
        else:
            turns.append(answer(words))
    return turns, waiting


def with_media(turns: Iterable[Turn], media: Iterable[Medium]) -> list[Turn]:
    """Turns with other media in place of theirs, in order."""
    waiting = iter(media)
    return [
        replace(
            turn, content=tuple(p if isinstance(p, str) else next(waiting) for p in turn.content)
        )
        for turn in turns
    ]


def _check_placeholders(text: str, media: Sequence[Medium], where: str | None) -> None:
    """Refuses more placeholders of a modality than media of it, unless there are none of it."""
    for modality, count in Counter(placeholders(text)).items():
        attached = sum(medium.modality == modality for medium in media)
        if 0 < attached < count:
            raise RecordError(
                f"the question has {count} <{modality}> placeholders "
                f"but {attached} {modality} input(s)",
                where=where,
                hint="give as many files as placeholders",
            )


def answer(text: str) -> Turn:
    """The turn of the model: plain text, whatever it contains."""
    return Turn(GPT, (text,) if text else ())

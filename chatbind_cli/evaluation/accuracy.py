"""Whether an answer is right: as strict as the kind of its reference lets one be.

- A choice (`B`, `(B)`, `B. dog`, or the text of an option): the one letter that the answer
  settles on, else the one option whose text stands in it. Source: the extraction of ScienceQA in
  LLaVA, of MMMU and of VLMEvalKit, without a guess where nothing is found.
- Yes or no: the word that leads the answer, else the only one of the two that is in it. Source:
  MME, VLMEvalKit. POPE takes a statement without either for a yes; here it is wrong.
- A number (`3`, `three`, `3.0`, `1,000`): the only number in the answer ("3 apples").
- A short answer: it stands in the answer as whole words, is not denied, and no alternative stands
  beside it ("not Paris but London", "Paris or London").
- A sentence: the same words in the same order; nothing less says that the rest is right, too.

Of several references one is enough. For the ten answers of VQA that is more lenient than VQA's
own accuracy, min(n / 3, 1), which is neither right nor wrong.

An answer that was chosen by its likelihood (`choices` in its record) is one of the choices, and
the right one or not.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from string import ascii_uppercase
from typing import Any

from chatbind_cli.evaluation.texts import CJK, exact_match, plain, words, words_of

_MEANS = dict.fromkeys(("yes", "yeah", "yep", "true"), "yes")
_MEANS |= dict.fromkeys(("no", "nope", "false"), "no")
_BOTH = re.compile(r"\W*(?:yes|no)\W*(?:(?:and|or|but)\W+(?:yes|no)\b|(?:yes|no)\W*$)")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_SHORT = 5
"""Words of a short answer at most; two characters of Chinese or Japanese count as one."""

_CUE = re.compile(
    r"\b(?:answer|(?:correct|right|best) (?:option|choice|one))"
    r"(?:\s+to\s[^.\n]{1,60}?|\s+(?:would|should|must))?\s*(?:\b(?:is|be)\b|[:=])"
    r"|答案(?:是|为)?:?|答えは|\\boxed\{",
    re.IGNORECASE,
)
_SENTENCE_ENDS = re.compile(r"[.!?;]+(?:\s+(?!(?:or|and)\b)|$)|[。\n]+", re.IGNORECASE)
_CLAUSE_ENDS = re.compile(r"[.,;:!?()、。\n]|\bbut\b")
_WINDOW = 200
"""Characters on each side of what was said in which a denial of it is looked for."""
_DENIED_BEFORE = re.compile(
    r"\b(?:not|no|never|neither|nor|without|cannot|rather than|instead of|other than|except)\b"
    r"|n't\b|\b(?:is|are|was|were|do|does|did|ca|wo|could|would|should)nt\b"
    r"|不是|没有|沒有|并非|[不没無无]$"
)
_DENIED_AFTER = re.compile(
    r"\W{0,3}(?:(?:is|are|was|were|would be)\s+(?:not|wrong|incorrect|false)\b"
    r"|(?:is|are|was|were)n't\b|(?:では|じゃ)(?:な|あ))"
)
_BESIDE_BEFORE = r"\s*(?:(?:an?|the)\s+)?\W{0,3}$"
_OR_BEFORE = re.compile(rf"(?:\bor\b|/|或者?|还是|還是){_BESIDE_BEFORE}")
_OR_AFTER = re.compile(r"\W{0,3}(?:or\b|/|或|还是|還是)|[^.!?\n]{0,80},\s*or\b")
_AND_BEFORE = re.compile(rf"(?:\band\b|&){_BESIDE_BEFORE}")
_AND_AFTER = re.compile(r"\W{0,3}(?:and\b|&)")

_OPTION = re.compile(r"(?:^|(?<=\s))\(?([A-Za-z])[.):]\s*(?=\S)", re.MULTILINE)
_MOST_MARKS = 1000
_ALONE = re.compile(r"\W*([A-Za-z])\W*")
_LETTER = re.compile(
    r"(?<![A-Za-z0-9_'’-])(?:([B-HJ-Z])"
    # "A" and "I" are words, too, unless nothing, a verb or a reason follows.
    r"|([AI])(?!\s+(?!(?:[A-Z]|is|was|seems|because|since|as|or|and|but)\b)\w))(?![A-Za-z0-9_'’-])"
    r"|(?:^|\()([a-z])\)"
)
_NO_LETTER = re.compile(
    r"\b(?:not|than|instead of)\s+(?:option\s+)?\(?[A-Z]\b\)?"
    r"|\b[A-Z]\b\)?\s+(?:is|would be)\s+(?:not|wrong|incorrect)\b"
)


def is_correct(answer: str, references: Iterable[str], question: Mapping[str, Any]) -> bool:
    """Whether the answer says what one of the references says.

    Args:
        answer: what was answered; what a model thought before (`</think>`) does not count.
        references: the right answers.
        question: the question's record, for the options of a choice.
    """
    answer = answer.rpartition("</think>")[2]
    options = options_of(question)
    return any(_is_correct(answer, reference, options) for reference in references)


def chose_right(
    chosen: str, choices: Sequence[str], references: Iterable[str], question: Mapping[str, Any]
) -> bool | None:
    """Whether the one of `choices` that was chosen is what a reference names.

    No words are weighed: a reference is one of the choices, or the letter of one, or the text of
    the option that has a letter.

    Returns:
        None: the references name none of them.
    """
    options = options_of(question)
    by_letter = dict(zip(ascii_uppercase, choices, strict=False))
    meant: set[str] = set()
    for reference in references:
        same = {choice for choice in choices if exact_match(choice, [reference])}
        letter = _letter_meant(reference, options) or ""
        named = letter if letter in choices else by_letter.get(letter)
        meant |= same or ({named} if named is not None else set())
    return chosen in meant if meant else None


def options_of(question: Mapping[str, Any]) -> dict[str, str]:
    """The options of a choice by letter: those of `options` or `choices`, or of the text.

    In the text they stand as `A. cat`, `(A) cat` or `A) cat`, on lines or one after the other.
    """
    given = question.get("options", question.get("choices"))
    if isinstance(given, Mapping):
        return {str(letter).upper(): str(text) for letter, text in given.items()}
    if isinstance(given, list):
        return dict(zip(ascii_uppercase, map(str, given), strict=False))
    text = str(question.get("text", ""))
    found: dict[str, str] = {}
    marks = list(islice(_OPTION.finditer(text), _MOST_MARKS))
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    for mark, end in zip(marks, ends, strict=False):
        if mark[1].upper() == chr(ord("A") + len(found)):
            found[mark[1].upper()] = text[mark.end() : end].partition("\n")[0].strip()
    return found if len(found) > 1 else {}


def _is_correct(answer: str, reference: str, options: Mapping[str, str]) -> bool:
    if exact_match(answer, [reference]):
        return True
    letter = _letter_meant(reference, options)
    if letter is not None:
        return _chosen(answer, options) == letter
    wanted, said = words(reference), _settled(plain(answer))
    if len(wanted) == 1 and wanted[0] in _MEANS:
        return _yes_or_no(said) == _MEANS[wanted[0]]
    if len(wanted) == 1 and _NUMBER.fullmatch(wanted[0]):
        return _only_number(said) == wanted[0]
    return bool(wanted) and not _is_sentence(reference) and _says(said, wanted)


def _is_sentence(reference: str) -> bool:
    """Whether a reference is more than a short answer: it has many words, or ends as one."""
    characters = len(re.findall(f"[{CJK}]", reference))
    n = len(words(reference)) - characters / 2
    ends = reference.rstrip().endswith(tuple(".!?。！？"))
    return n > _SHORT or (ends and (len(reference.split()) > 2 or characters > 2))


def _settled(text: str) -> str:
    """What comes after the last "the answer is"; all of it where that is not said."""
    for cue in reversed(list(_CUE.finditer(text))):
        if re.search(r"\w", text[cue.end() :]):
            return text[cue.end() :]
    return text


def _sentences(text: str) -> Iterator[str]:
    return filter(str.strip, _SENTENCE_ENDS.split(text))


def _letter_meant(reference: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that a reference names; None if it names none."""
    text = unicodedata.normalize("NFKC", reference).strip()
    named = _ALONE.fullmatch(text) or _OPTION.match(text)
    if named is not None:
        return named[1].upper()
    same = (letter for letter, option in options.items() if words(option) == words(reference))
    return next(same, None)


def _chosen(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer settles on; None if there is none, or more than one."""
    said = _settled(unicodedata.normalize("NFKC", answer).replace("*", ""))
    alone = _ALONE.fullmatch(said)
    if alone is not None:
        return alone[1].upper()
    for sentence in _sentences(_NO_LETTER.sub(" ", said)):
        alone = _ALONE.fullmatch(sentence)
        letters = {"".join(groups).upper() for groups in _LETTER.findall(sentence)}
        letters |= {alone[1].upper()} if alone else set()
        letters &= options.keys() or letters
        if letters:
            return letters.pop() if len(letters) == 1 else None
    named = {letter: words(text) for letter, text in options.items()}
    named = {letter: text for letter, text in named.items() if text and _says(plain(said), text)}
    # Who says the option "cat and dog" says the option "cat", too, without meaning it.
    meant = [
        letter
        for letter, text in named.items()
        if not any(text != other and _places(other, text) for other in named.values())
    ]
    return meant[0] if len(meant) == 1 else None


def _yes_or_no(said: str) -> str | None:
    for sentence in _sentences(said):
        all_words = words(sentence)
        found = [word for word in all_words if word in _MEANS]
        both = len({_MEANS[word] for word in found}) > 1
        if found and found[0] == all_words[0]:
            return None if both and _BOTH.match(sentence) else _MEANS[found[0]]
        if found:
            return None if both or not _says(sentence, found[:1]) else _MEANS[found[0]]
    return None


def _only_number(said: str) -> str | None:
    for sentence in _sentences(said.rpartition("=")[2]):
        found = {word for word in words(sentence) if _NUMBER.fullmatch(word)}
        if found:
            return found.pop() if len(found) == 1 and _says(sentence, list(found)) else None
    return None


def _says(text: str, wanted: list[str]) -> bool:
    """Whether the words stand in a plain text in a row, never denied or one of alternatives."""
    said, n = words_of(text), len(wanted)
    places = _places([word.text for word in said], wanted)
    brief = len(said) < n + _SHORT
    return bool(places) and all(
        _affirmed(text, said[i].start, said[i + n - 1].end, brief=brief) for i in places
    )


def _places(said: list[str], wanted: list[str]) -> list[int]:
    """Where the wanted words begin."""
    n = len(wanted)
    return [i for i in range(len(said) - n + 1) if said[i : i + n] == wanted]


def _affirmed(text: str, start: int, end: int, *, brief: bool) -> bool:
    """Whether what stands there is neither denied nor one of several.

    In a `brief` answer an "and" beside it joins another answer; in a long one, a description.
    """
    before, after = text[max(0, start - _WINDOW) : start], text[end : end + _WINDOW]
    denied = _DENIED_BEFORE.search(_CLAUSE_ENDS.split(before)[-1]) or _DENIED_AFTER.match(after)
    other = _OR_BEFORE.search(before) or _OR_AFTER.match(after)
    if brief:
        other = other or _AND_BEFORE.search(before) or _AND_AFTER.match(after)
    return not (denied or other)

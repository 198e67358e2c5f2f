"""How an answer is generated: the few numbers that a user may choose.

Imports nothing heavy: a command checks them before it loads anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from chatbind_cli.errors import UsageError

_LEAST_TEMPERATURE = 1e-6  # scores divided by less are no numbers any more
_MOST_STOPS = 64
_MOST_OF_A_STOP = 1000  # characters; after each token as many are decoded again
_MOST_SHOWN = 80
_HOSTED = frozenset({"max_new_tokens", "temperature", "top_p", "seed", "stop"})


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """What decides an answer beside the model and the prompt.

    Raises:
        UsageError: a value is outside its range.
    """

    max_new_tokens: int = 512
    """Tokens after which an answer is cut off."""
    temperature: float = 0.0
    """0: always the likeliest token (greedy); above: sampled from the distribution at that
    temperature."""
    top_p: float = 1.0
    """Sampling looks only at the likeliest tokens that hold this much of the probability."""
    top_k: int = 0
    """Sampling looks only at so many of the likeliest tokens; 0: at all."""
    min_p: float = 0.0
    """Sampling leaves out tokens less likely than this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divides the scores of tokens that prompt or answer have already; 1 for none."""
    no_repeat_ngram_size: int = 0
    """No run of so many tokens comes twice; 0: it may."""
    num_beams: int = 1
    """Beams of beam search; 1 for none."""
    length_penalty: float = 1.0
    """Power of its length that a beam's score is divided by; above 0 long answers gain."""
    samples: int = 1
    """Answers that are drawn to each question."""
    logprobs: bool = False
    """Whether an answer tells the log-probability of each of its tokens."""
    seed: int = 0
    """Seed of sampling; the answers of greedy decoding do not depend on it."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, beside the model's own end. They are not part of it."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_new_tokens", 1, 1 << 20),
            ("temperature", 0.0, 100.0),
            ("top_k", 0, 1 << 31),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.01, 100.0),
            ("no_repeat_ngram_size", 0, 1 << 20),
            ("num_beams", 1, 64),
            ("length_penalty", -10.0, 10.0),
            ("samples", 1, 1024),
            ("seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(
                    f"{name} is {value!s:.40}", hint=f"it must lie between {low} and {high}"
                )
        if 0.0 < self.temperature < _LEAST_TEMPERATURE:
            least = f"it must be 0, or at least {_LEAST_TEMPERATURE:g}"
            raise UsageError(f"temperature is {self.temperature}", hint=least)
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"top_p is {self.top_p}", hint="it must lie above 0, and be at most 1")
        if not all(self.stop):
            raise UsageError("a stop text is empty", hint="leave it out")
        if len(self.stop) > _MOST_STOPS or any(len(text) > _MOST_OF_A_STOP for text in self.stop):
            limits = f"at most {_MOST_STOPS} of at most {_MOST_OF_A_STOP} characters"
            raise UsageError("too many stop texts, or too long ones", hint=limits)
        if self.samples > 1 and not self.sampled:
            raise UsageError("several samples of a greedy answer", hint="give a temperature")
        if self.num_beams > 1 and (self.samples > 1 or self.logprobs):
            raise UsageError("num_beams goes with neither samples nor logprobs")
        for field in fields(self):
            if isinstance(field.default, float):
                # the library insists on it, and JSON's 1 is none
                object.__setattr__(self, field.name, float(getattr(self, field.name)))

    @property
    def sampled(self) -> bool:
        """Whether answers are drawn at random."""
        return self.temperature > 0.0

    def changed(self, values: Mapping[str, Any]) -> GenerationSettings:
        """The same but for what a record says under the names of the fields.

        Raises:
            UsageError: there is no such field, or its value is of another type or out of range.
        """
        known = {field.name: field.default for field in fields(self)}
        taken: dict[str, Any] = {}
        for name, value in values.items():
            if name not in known:
                near = get_close_matches(str(name)[:_MOST_SHOWN], known, n=1)
                raise UsageError(
                    f"{str(name)[:_MOST_SHOWN]} is no setting of generation",
                    hint=f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}",
                )
            taken[name] = _typed(name, value, known[name])
        return replace(self, **taken)

    def refuse_elsewhere(self) -> None:
        """Refuses what an engine (`--engine`) cannot do, or would do in another way.

        Raises:
            UsageError: it is asked for.
        """
        for name, asked, why in (
            ("temperature", self.temperature > 2.0, "it knows none above 2"),
            ("num_beams", self.num_beams > 1, "its beam search is another one"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size > 0, "it has no such setting"),
            (
                "repetition_penalty",
                self.repetition_penalty != 1.0,
                "it does not know the prompt's tokens, which count, too",
            ),
        ):
            if asked:
                hint = "leave it out, or answer without --engine"
                raise UsageError(f"an engine cannot take {name}: {why}", hint=hint)

    def refuse_hosted(self) -> None:
        """Refuses what a hosted chat model (`--answerer`) has no parameter for.

        Raises:
            UsageError: it is asked for.
        """
        for field in fields(self):
            if field.name not in _HOSTED and getattr(self, field.name) != field.default:
                what = f"a hosted model takes no {field.name}"
                raise UsageError(what, hint="leave it out, or answer without --answerer")

    def as_record(self) -> dict[str, Any]:
        """What an answer record says of it; without what had no influence."""
        record: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
        }
        if self.sampled:
            record |= {"top_p": self.top_p, "seed": self.seed}
            record |= self._changed("top_k", "min_p", "samples")
        record |= self._changed("repetition_penalty", "no_repeat_ngram_size", "logprobs")
        if self.num_beams > 1:
            record |= {"num_beams": self.num_beams, **self._changed("length_penalty")}
        if self.stop:
            record["stop"] = list(self.stop)
        return record

    def _changed(self, *names: str) -> dict[str, Any]:
        """The values of these that are not the defaults."""
        defaults = {field.name: field.default for field in fields(self)}
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value != defaults[name]}


def _typed(name: str, value: Any, default: Any) -> Any:
    """A value out of JSON, if it is of the type of the field's default."""
    fits: bool
    match default:
        case tuple():
            value = [value] if isinstance(value, str) else value
            fits = isinstance(value, list) and all(isinstance(text, str) for text in value)
            value, wanted = tuple(value) if fits else value, "a text or a list of texts"
        case bool():
            fits, wanted = isinstance(value, bool), "true or false"
        case int():
            fits, wanted = type(value) is int, "a whole number"
        case _:
            fits, wanted = type(value) in (int, float), "a number"
    if not fits:
        shown = repr(value)[:_MOST_SHOWN]
        raise UsageError(f"{name} must be {wanted}, not {shown}")
    return value

"""One answer that is being made: of which question, how, and its tokens so far."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from chatbind_cli.data.tokens import TokenizedSample
from chatbind_cli.inference.decoding import AnswerDecoder, Generated, GrowingText, Outcome
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.questions import Question, where_of
from chatbind_cli.inference.sampling import NextToken


@dataclass(eq=False)
class Ask:
    """An answer on its way; of a question with several samples, one of them.

    Args:
        question: it is to this one.
        prompt: of the question.
        settings: how it is made.
        decoder: knows where it ends.
        room: most tokens of it: as wanted, or as the model's context has.
        sample: its number among the answers to its question.
        outcomes: of all samples of the question, by their numbers, as far as they are done.
    """

    question: Question
    prompt: TokenizedSample
    settings: GenerationSettings
    decoder: AnswerDecoder
    room: int
    sample: int = 0
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forgets what of the answer is there. The same will come again."""
        self.ids: list[int] = []
        self._growing = GrowingText(self.decoder)
        self.logprobs: list[float] | None = [] if self.settings.logprobs else None

    @property
    def read(self) -> list[int]:
        """All tokens so far, those of the prompt included."""
        return [*self.prompt.input_ids, *self.ids]

    @property
    def where(self) -> str:
        """What an error message calls it."""
        return where_of(self.question)

    @property
    def salt(self) -> str:
        """What decides its draws: the seed, the question's id, the number of the sample."""
        return f"{self.settings.seed}\0{self.question.id!r}\0{self.sample}"

    def draw(self) -> float:
        """A random number from 0 to below 1 for its next token, whatever was drawn before."""
        return hashed(f"{self.salt}\0{len(self.ids)}", 53) / 2**53

    def take(self, following: NextToken) -> None:
        """Goes on by a token."""
        assert following.token is not None
        self.ids.append(following.token)
        if self.logprobs is not None and following.logprob is not None:
            self.logprobs.append(following.logprob)

    @property
    def ended(self) -> bool:
        """Whether the answer is whole: by its last token, a stop text, or for want of room."""
        if self.ids[-1] in self.decoder.end_ids or len(self.ids) >= self.room:
            return True
        tail = self.ids[-self.decoder.longest_stop_tokens :]
        return bool(self.decoder.stops) and self.decoder.has_stop(tail)

    def tell(self) -> None:
        """Lets whoever listens hear of it."""
        if self.question.listener is not None:
            self.question.listener.grown(self.sample, self._growing.safe(self.ids))

    def generated(self) -> Generated:
        """The answer."""
        return self.decoder.finished(self.ids, self.logprobs)


def hashed(text: str, bits: int) -> int:
    """A number of so many bits that is as good as random, and always the same for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> (64 - bits)

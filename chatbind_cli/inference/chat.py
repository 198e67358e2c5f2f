"""What runs inside `ask`: questions and answers in turn, each answer shown while it grows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from chatbind_cli.artifacts import emit_record
from chatbind_cli.console import note
from chatbind_cli.errors import UsageError
from chatbind_cli.inference.answer_record import short_digest, told
from chatbind_cli.inference.answer_view import View
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.questions import Question
from chatbind_cli.inference.stream import Stream
from chatbind_cli.jsonl import Record
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.source import shown
from chatbind_cli.model.turns import Turn
from chatbind_cli.model.turns import answer as answer_turn
from chatbind_cli.model.turns import question as question_turn


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question, with its `turn`, and what was answered.

    `whole` is False for an answer that was interrupted.
    """

    question: Question
    answer: str
    whole: bool = True


class Chat:
    """Questions and answers in turn, and what is attached to the next question.

    Answers are shown in `view` while they grow; without one, there is a record of each that is
    whole on standard output.

    Attributes:
        exchanges: what was said, oldest first.
        left_out: how many of the oldest the model reads no more, since its context was full.
        waiting: the media that go with the next question.
        mix: whether the media of a question become one embedding.
    """

    def __init__(
        self,
        answerer: Answerer,
        settings: GenerationSettings,
        *,
        model_id: str,
        view: View | None,
        mix: bool = False,
        verbose: bool = False,
    ) -> None:
        self.exchanges: list[Exchange] = []
        self.left_out = 0
        self.waiting: list[Medium] = []
        self.mix = mix
        self.model_id = model_id
        self._system: str | None = None
        self._answerer = answerer
        self._settings = settings
        self._view = view
        self._verbose = verbose

    @property
    def system(self) -> str | None:
        """What tells the model how to answer; None: its prompt style's own text.

        Raises:
            ChatBindError: (when set) the model takes none.
        """
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text is not None:
            self._answerer.prompts.prompt([question_turn("?")], text)
        self._system = text

    def attach(self, *media: Medium) -> None:
        """Adds media to the next question."""
        self.waiting += media

    def ask(self, question: str) -> None:
        """Asks about what is attached, and remembers question and answer.

        An answer that is interrupted is remembered as far as it was shown.

        Raises:
            ChatBindError: it cannot be asked; what was attached to it is let go.
            KeyboardInterrupt: the answer was interrupted.
        """
        media, self.waiting = self.waiting, []
        try:
            [prepared] = self.prepare([Question(question, tuple(media), self.mix)])
        except KeyboardInterrupt:
            self.waiting = media
            raise
        self._answer(prepared, self._settings)

    def retry(self) -> None:
        """Asks the last question again; where answers are drawn, with the next seed.

        Raises:
            UsageError: there is none.
            Exception: it cannot be answered; it stays as it was.
            KeyboardInterrupt: the answer was interrupted.
        """
        last = self.undo()
        settings = last.question.settings or self._settings
        if settings.sampled:
            settings = replace(settings, seed=settings.seed + 1)
        elif last.whole:
            note("without --temperature the same question has the same answer")
        try:
            self._answer(last.question, settings)
        except Exception:
            self.exchanges.append(last)
            raise

    def undo(self) -> Exchange:
        """Forgets the last question and its answer.

        Raises:
            UsageError: there is none.
        """
        if not self.exchanges:
            raise UsageError("nothing was asked yet")
        last = self.exchanges.pop()
        self.left_out = min(self.left_out, len(self.exchanges))
        return last

    def reset(self) -> None:
        """Forgets what was said, and what waits; the system text stays."""
        self.exchanges.clear()
        self.waiting.clear()
        self.left_out = 0

    def prepare(self, questions: Sequence[Question]) -> list[Question]:
        """Questions with their turns: media embedded, and each short enough to be asked alone.

        Raises:
            ChatBindError: one of them cannot be asked.
        """
        asked = [replace(question, system=self._system) for question in questions]
        prepared = self._answerer.prepare(asked)
        for question in prepared:
            if question.problem is not None:
                raise question.problem
        return prepared

    def _answer(self, question: Question, settings: GenerationSettings) -> None:
        question = self._in_dialogue(replace(question, system=self._system, settings=settings))
        started, first = time.monotonic(), 0.0
        stream = Stream(self._answerer.engine, question, settings)
        pieces: list[str] = []
        said = replace(question, prompt=None)
        try:
            for piece in stream:
                first = first or time.monotonic()
                pieces.append(piece)
                if self._view is not None:
                    self._view.show(piece)
        except KeyboardInterrupt:
            self.exchanges.append(Exchange(said, "".join(pieces), whole=False))
            self._end_line()
            raise
        except Exception:
            if pieces:
                self._end_line()
            raise
        self._end_line()
        self.exchanges.append(Exchange(said, "".join(pieces)))
        assert stream.result is not None
        self._tell(question, stream.result, settings, started, first)

    def _end_line(self) -> None:
        if self._view is not None:
            self._view.end()

    def _in_dialogue(self, question: Question) -> Question:
        """The question behind what was said before, as far as there is room for it.

        Whole exchanges are left out, the oldest first, where there is no room for an answer too:
        more than it needs, since all the others have then to be read again.
        """
        assert question.turn is not None
        longest = self._answerer.engine.longest_context
        room = min(self._settings.max_new_tokens, (longest or 0) // 4)
        left_out = self.left_out
        while True:
            turns = [*self._turns(left_out), question.turn]
            prompt = self._answerer.prompts.prompt(turns, question.system)
            if longest is None or left_out == len(self.exchanges):
                break
            spare = longest // 4 if left_out > self.left_out else 0
            if len(prompt.input_ids) + room + spare <= longest:
                break
            left_out += 1
        if left_out > self.left_out:
            note(
                f"the context is full: from here on the model does not know the first {left_out} "
                f"of {len(self.exchanges)} questions and their answers"
            )
            self.left_out = left_out
        return replace(question, prompt=prompt)

    def _turns(self, left_out: int) -> list[Turn]:
        turns: list[Turn] = []
        for said in self.exchanges[left_out:]:
            assert said.question.turn is not None
            turns += [said.question.turn, answer_turn(said.answer)]
        return turns

    def _tell(
        self,
        question: Question,
        generated: Generated,
        settings: GenerationSettings,
        started: float,
        first: float,
    ) -> None:
        """The record of an answer, and how long it took."""
        ended = time.monotonic()
        if self._view is None:
            emit_record(self._record(question, generated, settings, ended - started))
        if self._verbose:
            assert question.prompt is not None
            first = first or ended
            count = generated.n_tokens
            # what came before the first is the prompt's; but beams come all at once
            alone = count > 1 and first < ended and settings.num_beams == 1
            rate = (count - 1) / (ended - first) if alone else count / max(ended - started, 1e-6)
            note(
                f"{count} tokens, {rate:.1f} tokens/s, the first after {first - started:.2f} s; "
                f"{len(question.prompt.input_ids)} tokens in the prompt"
            )

    def _record(
        self,
        question: Question,
        generated: Generated,
        settings: GenerationSettings,
        seconds: float,
    ) -> Record:
        media: list[Record] = [
            {"path": shown(medium.name), "modality": medium.modality, "weight": medium.weight}
            | ({} if question.mix else {"sha256": medium.sha256})
            for medium in question.media
        ]
        identity = short_digest(question.text, media)
        return {
            "question_id": identity,
            "prompt": question.text,
            "text": generated.text,
            "answer_id": short_digest(identity, generated.text, self.model_id),
            "model_id": self.model_id,
            **told(generated),
            "metadata": {
                "n_tokens": generated.n_tokens,
                "finish_reason": generated.finish_reason,
                "seconds": round(seconds, 3),
                "media": media,
                "mix": question.mix,
                **({} if question.system is None else {"system": question.system}),
                **settings.as_record(),
            },
        }

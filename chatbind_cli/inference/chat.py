"""What runs inside `ask`: questions and answers in turn, each answer shown while it grows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from chatbind_cli.artifacts import emit_record
from chatbind_cli.console import note, printable
from chatbind_cli.errors import ChatBindError, MediaError, UsageError
from chatbind_cli.inference.answer_record import short_digest, told
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.questions import Question
from chatbind_cli.jsonl import Record
from chatbind_cli.media.medium import Medium, parse_attachment
from chatbind_cli.media.modality import MODALITIES
from chatbind_cli.media.root import ADDRESSES
from chatbind_cli.media.source import shown
from chatbind_cli.model.turns import Turn
from chatbind_cli.model.turns import answer as answer_turn

_HELP = (
    f"/attach FILE, or {', '.join(f'/{modality}' for modality in MODALITIES)} FILE where its "
    "content does not tell what it is; /reset, /quit; everything else is a question"
)


class Chat:
    """Questions and answers in turn, and what is attached to the next question.

    Answers are shown on `out` while they grow; without it, there is a record of each that is whole
    on standard output.
    """

    def __init__(
        self,
        answerer: Answerer,
        settings: GenerationSettings,
        *,
        model_id: str,
        out: IO[str] | None,
        mix: bool = False,
    ) -> None:
        self._answerer = answerer
        self._settings = settings
        self._model_id = model_id
        self._out = out
        self._mix = mix
        self._history: list[Turn] = []
        self._waiting: list[Medium] = []
        self._started = time.monotonic()

    def attach(self, *media: Medium) -> None:
        """Adds media to the next question."""
        self._waiting += media

    def ask(self, question: str) -> None:
        """Asks about what is attached, and remembers question and answer.

        An answer that is interrupted is remembered as far as it was shown.

        Raises:
            ChatBindError: it cannot be asked; what was attached to it is let go.
            KeyboardInterrupt: the answer was interrupted.
        """
        asked = Question(question, tuple(self._waiting), self._mix)
        self._waiting = []
        [prepared] = self._answerer.prepare([asked], history=self._history)
        stream = self._answerer.stream_prepared(prepared, self._settings)
        assert prepared.turn is not None
        pieces: list[str] = []
        try:
            for piece in stream:
                pieces.append(piece)
                self._show(piece)
        finally:
            self._history += [prepared.turn, answer_turn("".join(pieces))]
            self._end(prepared, stream.result)

    def _show(self, text: str) -> None:
        """Writes more of an answer and hands it to the operating system."""
        if self._out is not None:
            self._out.write(printable(text) if self._out.isatty() else text)
            self._out.flush()

    def _end(self, question: Question, generated: Generated | None) -> None:
        """Ends the line, or writes the record; there is none of an answer that was cut off."""
        self._show("\n")
        seconds, self._started = time.monotonic() - self._started, time.monotonic()
        if self._out is None and generated is not None:
            emit_record(self._record(question, generated, seconds))

    def _record(self, question: Question, generated: Generated, seconds: float) -> Record:
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
            "answer_id": short_digest(identity, generated.text, self._model_id),
            "model_id": self._model_id,
            **told(generated),
            "metadata": {
                "n_tokens": generated.n_tokens,
                "finish_reason": generated.finish_reason,
                "seconds": round(seconds, 3),
                "media": media,
                "mix": question.mix,
                **self._settings.as_record(),
            },
        }

    def run(self, lines: Iterator[str]) -> None:
        """Answers the lines of a dialogue until it ends.

        A line that fails leaves a note, and the dialogue goes on. An interrupt ends the answer at
        hand.

        Raises:
            KeyboardInterrupt: an interrupt while no answer is at hand.
        """
        for line in lines:
            try:
                if not self._take(line.strip()):
                    return
            except KeyboardInterrupt:
                note("the answer was interrupted")
            except ChatBindError as error:
                note(str(error))

    def _take(self, line: str) -> bool:
        """Does what a line says, and tells whether the dialogue goes on."""
        word, _, rest = line.partition(" ")
        match word:
            case "":
                return True
            case "/quit" | "/exit":
                return False
            case "/reset":
                self._history.clear()
                self._waiting.clear()
            case "/attach":
                self.attach(_present(parse_attachment(rest.strip())))
            case _ if word[0] == "/" and word[1:] in MODALITIES:
                self.attach(_present(parse_attachment(rest.strip(), word[1:])))
            case "/help":
                note(_HELP)
            case _ if word.startswith("/"):
                raise UsageError(f"{word} is no instruction", hint=_HELP)
            case _:
                self.ask(line)
        return True


def _present(attachment: Medium) -> Medium:
    """The attachment; now is the time to say that there is no such file, not at the question.

    Raises:
        MediaError: there is none.
    """
    ref = str(attachment.ref)
    if not ref.startswith(ADDRESSES) and not Path(ref).exists():
        raise MediaError("no such file", where=ref)
    return attachment

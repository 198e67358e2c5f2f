"""A dialogue: questions and answers in turn, each answer shown while it grows.

Where the questions come from, and what a model is, is not known here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

from chatbind_cli.answering.questions import short_digest
from chatbind_cli.answering.session import Answerer, Asked, Prepared, Stream
from chatbind_cli.answering.settings import GenerationSettings
from chatbind_cli.artifacts import emit_record
from chatbind_cli.console import note, printable
from chatbind_cli.errors import ChatBindError, MediaError, UsageError
from chatbind_cli.jsonl import Record
from chatbind_cli.media.medium import Medium, parse_attachment
from chatbind_cli.media.modality import MODALITIES
from chatbind_cli.media.source import shown

_HELP = (
    f"/attach FILE, or {', '.join(f'/{modality}' for modality in MODALITIES)} FILE where its "
    "content does not tell what it is; /reset, /quit; everything else is a question"
)


class Display(Protocol):
    """Shows an answer while and when it comes."""

    def piece(self, text: str) -> None:
        """More of the answer's text."""
        ...

    def end(self, asked: Asked, prepared: Prepared, stream: Stream) -> None:
        """The answer is over; `stream.result` is None if it was cut off."""
        ...


class TextDisplay:
    """Plain text that grows.

    Args:
        out: where it goes.
    """

    def __init__(self, out: IO[str]) -> None:
        self._out = out

    def piece(self, text: str) -> None:
        """Writes it and hands it to the operating system."""
        self._out.write(printable(text) if self._out.isatty() else text)
        self._out.flush()

    def end(self, asked: Asked, prepared: Prepared, stream: Stream) -> None:
        """Ends the line."""
        self.piece("\n")


class RecordDisplay:
    """One answer record on standard output; none for an answer that was cut off.

    Args:
        model_id: whose answers these are.
        settings: of generation.
    """

    def __init__(self, model_id: str, settings: GenerationSettings) -> None:
        self._model_id = model_id
        self._settings = settings
        self._started = time.monotonic()

    def piece(self, text: str) -> None:
        """A record is written whole."""

    def end(self, asked: Asked, prepared: Prepared, stream: Stream) -> None:
        """Writes the record."""
        result = stream.result
        seconds, self._started = time.monotonic() - self._started, time.monotonic()
        if result is None:
            return
        media: list[Record] = [
            {"path": shown(medium.name), "modality": medium.modality, "weight": medium.weight}
            for medium in asked.media
        ]
        if not asked.mix:
            for entry, (percept, _) in zip(media, prepared.media.values(), strict=True):
                entry |= {"modality": percept.modality, "sha256": percept.sha256}
        identity = short_digest(asked.text, media)
        emit_record(
            {
                "question_id": identity,
                "prompt": asked.text,
                "text": result.text,
                "answer_id": short_digest(identity, result.text, self._model_id),
                "model_id": self._model_id,
                "metadata": {
                    "n_tokens": result.n_tokens,
                    "finish_reason": result.finish_reason,
                    "seconds": round(seconds, 3),
                    "media": media,
                    "mix": asked.mix,
                    **self._settings.as_record(),
                },
            }
        )


class Dialogue:
    """Questions and answers in turn, and what is attached to the next question.

    Args:
        answerer: who answers.
        settings: of generation.
        display: shows the answers.
        mix: see `Asked`.
    """

    def __init__(
        self,
        answerer: Answerer,
        settings: GenerationSettings,
        display: Display,
        *,
        mix: bool = False,
    ) -> None:
        self._answerer = answerer
        self._settings = settings
        self._display = display
        self._mix = mix
        self._history: list[Prepared | str] = []
        self._waiting: list[Medium] = []

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
        asked = Asked(question, tuple(self._waiting), self._mix)
        self._waiting = []
        [prepared] = self._answerer.prepare([asked], history=self._history)
        if isinstance(prepared, ChatBindError):
            raise prepared
        stream = self._answerer.stream_prepared(prepared, self._settings)
        pieces: list[str] = []
        try:
            for piece in stream:
                pieces.append(piece)
                self._display.piece(piece)
        finally:
            self._history += [prepared, "".join(pieces)]
            self._display.end(asked, prepared, stream)

    def chat(self, lines: Iterator[str]) -> None:
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
    if not ref.startswith(("http://", "https://", "data:")) and not Path(ref).exists():
        raise MediaError("no such file", where=ref)
    return attachment

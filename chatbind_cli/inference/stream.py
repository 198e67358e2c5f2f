"""One answer, piece by piece while it is made."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.engine import Engine
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.questions import Question


class Stream:
    """An answer that grows: iterate over its pieces, then read `result`, which is the whole.

    The work is done in a thread of its own, and this is the question's `Listener`. Leaving the loop
    early, by an interrupt too, gives the answer up: it ends after the token at hand.

    Args:
        engine: who answers.
        question: a prepared one.
        settings: how it is answered, where it does not say that itself.
    """

    def __init__(self, engine: Engine, question: Question, settings: GenerationSettings) -> None:
        self.result: Generated | None = None
        self.gone = False
        self._question = replace(question, listener=self)
        self._engine = engine
        self._settings = settings
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._shown = ""

    def __iter__(self) -> Iterator[str]:
        """Yields the pieces of the answer.

        Raises:
            ChatBindError: the question's `problem`, or whatever went wrong while generating.
        """
        with ThreadPoolExecutor(max_workers=1) as pool:
            future = pool.submit(self._answer)
            try:
                while (piece := self._pieces.get()) is not None:
                    yield piece
                self.result = future.result()
            finally:
                self.gone = True

    def grown(self, sample: int, text: str) -> None:
        """Hears the beginning of the answer, and shows what is new of it."""
        # should a tokenizer take back what it had shown, nothing more is shown than is right
        if text.startswith(self._shown) and len(text) > len(self._shown):
            piece = text[len(self._shown) :]
            self._shown = text
            self._pieces.put(piece)

    def _answer(self) -> Generated:
        try:
            generated = self._engine.answer(self._question, self._settings)
            self.grown(0, generated.text)
            return generated
        finally:
            self._pieces.put(None)

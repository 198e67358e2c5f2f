"""Questions about media, answered: the library's front door.

    answerer = Answerer.from_pretrained("model", encoder="imagebind")
    print(answerer.answer("What is this?", ["photo.jpg"]))

Knows nothing of records, files of questions and terminals.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from chatbind_cli.answering.generation import Generated, Generator, Prompt
from chatbind_cli.answering.opening import EncoderFinder, open_model
from chatbind_cli.answering.perception import Perceiver, Percept, Perception
from chatbind_cli.answering.settings import GenerationSettings
from chatbind_cli.data.tokens import PromptEncoder
from chatbind_cli.errors import ChatBindError, contained
from chatbind_cli.media.medium import Medium
from chatbind_cli.model.turns import Turn
from chatbind_cli.model.turns import answer as answer_turn
from chatbind_cli.model.turns import question as question_turn

MediaLike = str | Path | bytes | Medium


@dataclass(frozen=True, slots=True)
class Asked:
    """A question.

    Args:
        text: its words; placeholders such as `<image>` say where media go, else they follow.
        media: what it is about.
        mix: bring all media into one embedding (their weighted sum, at norm 1), which takes the
            place of the first; else each has its own.
        where: what an error message calls it.
    """

    text: str
    media: tuple[Medium, ...] = ()
    mix: bool = False
    where: str | None = None


@dataclass(frozen=True, eq=False)
class Prepared:
    """A question as the model reads it.

    Attributes:
        prompt: tokens and embeddings.
        turn: the question as a turn of a dialogue.
        media: what the media of the turn are, and their weights, in the order in which they were
            attached; a mix is one.
    """

    prompt: Prompt
    turn: Turn
    media: dict[Medium, tuple[Percept, float]]


class Answerer:
    """A ChatBind model that answers questions.

    Args:
        model: a `ChatBindForConditionalGeneration` in eval mode.
        tokenizer: its tokenizer.
        perceiver: knows the embeddings of media.
        style: prompt style; None for the model's own.
    """

    def __init__(
        self, model: Any, tokenizer: Any, perceiver: Perceiver, *, style: str | None = None
    ) -> None:
        self.model = model
        self.perceiver = perceiver
        self.prompts = PromptEncoder(tokenizer, model.config, style)
        self._numbers = itertools.count()
        self.generator = Generator(
            model,
            tokenizer,
            stop_ids=self.prompts.stop_token_ids,
            stops=self.prompts.stop_strings,
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        projector: str | Path | None = None,
        encoder: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> Answerer:
        """Opens a model.

        Args:
            path: a ChatBind folder, or a language model that `projector` goes with.
            projector: a projector file.
            encoder: ImageBind's weights; None: where the model says that they are.
            device: `auto`, `cpu`, `cuda`, ...
            dtype: `auto` (bfloat16 on a GPU, float32 on a CPU), `float32`, ...

        Raises:
            ChatBindError: something is not there, or does not fit.
        """
        opened = open_model(
            Path(path),
            projector=None if projector is None else Path(projector),
            device=device,
            dtype=dtype,
        )
        finder = EncoderFinder(opened, None if encoder is None else Path(encoder))
        perceiver = Perception(finder.open, options=opened.media_options())
        return cls(opened.bundle.model, opened.bundle.tokenizer, perceiver)

    def answer(
        self,
        question: str,
        media: Sequence[MediaLike] = (),
        *,
        history: Sequence[Prepared | str] = (),
        settings: GenerationSettings = GenerationSettings(),  # noqa: B008 (frozen)
    ) -> str:
        """The answer to one question.

        Args:
            question: its words.
            media: paths, URLs, bytes, or attachments with a modality and weight.
            history: earlier questions (as `prepare` gave them) and answers, in turn.
            settings: how to generate.

        Raises:
            ChatBindError: a medium cannot be read, or the question does not fit the model.
        """
        [prepared] = self.prepare([_asked(question, media)], history=history)
        [generated] = self.generate([_certain(prepared)], settings)
        return generated.text

    def stream(
        self,
        question: str,
        media: Sequence[MediaLike] = (),
        *,
        history: Sequence[Prepared | str] = (),
        settings: GenerationSettings = GenerationSettings(),  # noqa: B008 (frozen)
    ) -> Iterator[str]:
        """The answer to one question, piece by piece as it is generated. See `answer`."""
        [prepared] = self.prepare([_asked(question, media)], history=history)
        return iter(self.stream_prepared(_certain(prepared), settings))

    def answer_batch(
        self,
        questions: Sequence[tuple[str, Sequence[MediaLike]]],
        *,
        settings: GenerationSettings = GenerationSettings(),  # noqa: B008 (frozen)
    ) -> list[str]:
        """The answers to several questions, generated together. See `answer`.

        Args:
            questions: words and media of each.
            settings: how to generate.
        """
        prepared = self.prepare([_asked(text, media) for text, media in questions])
        return [g.text for g in self.generate([_certain(p) for p in prepared], settings)]

    def prepare(
        self, questions: Sequence[Asked], *, history: Sequence[Prepared | str] = ()
    ) -> list[Prepared | ChatBindError]:
        """Reads the media of questions and puts their prompts together.

        Args:
            questions: the questions.
            history: what was said before each of them: questions and answers in turn.

        Returns:
            One result a question; an error says why it cannot be asked.

        Raises:
            ChatBindError: no question with media can be asked, since the encoder is not there.
        """
        attachments = [medium for asked in questions for medium in asked.media]
        seen = iter(self.perceiver.look(attachments))
        results: list[Prepared | ChatBindError] = []
        for asked in questions:
            percepts = [next(seen) for _ in asked.media]
            failed = next((p for p in percepts if isinstance(p, ChatBindError)), None)
            if failed is not None:
                results.append(failed)
                continue
            try:
                results.append(self._prepared(asked, _percepts(percepts), history))
            except Exception as error:
                results.append(contained(error, where=asked.where or "the question"))
        return results

    def generate(
        self,
        questions: Sequence[Prepared],
        settings: GenerationSettings,
        *,
        salt: str = "",
    ) -> list[Generated]:
        """Answers prepared questions together; see `Generator.answers`."""
        return self.generator.answers([q.prompt for q in questions], settings, salt=salt)

    def stream_prepared(self, question: Prepared, settings: GenerationSettings) -> Stream:
        """Answers a prepared question piece by piece."""
        return Stream(self.generator, question.prompt, settings)

    def _prepared(
        self, asked: Asked, percepts: list[Percept], history: Sequence[Prepared | str]
    ) -> Prepared:
        self.generator.check_text(asked.text)
        weights = [medium.weight for medium in asked.media]
        if asked.mix and percepts:
            percepts, weights = [_mixed(percepts, weights)], [1.0]
        # within a prompt a medium goes by a number, since two may have the same name
        refs = [Medium(percept.modality, str(next(self._numbers))) for percept in percepts]
        media = dict(zip(refs, zip(percepts, weights, strict=True), strict=True))
        turn = question_turn(asked.text, refs, where=asked.where)
        turns = [e.turn if isinstance(e, Prepared) else answer_turn(e) for e in history]
        tokens = self.prompts.prompt([*turns, turn])
        known = dict(media)
        for entry in history:
            known.update(entry.media if isinstance(entry, Prepared) else {})
        read = [known[ref] for ref in tokens.media]
        nothing = torch.empty(0, self.model.config.embedding_dim)
        prompt = Prompt(
            tokens,
            torch.stack([percept.embedding for percept, _ in read]) if read else nothing,
            torch.tensor([weight for _, weight in read]),
        )
        self.generator.check_length(prompt)
        return Prepared(prompt, turn, media)


class Stream:
    """An answer that grows: iterate over its pieces, then read `result`.

    The model works in a thread of its own. Leaving the loop early, by an interrupt too, ends the
    answer after the token at hand.

    Attributes:
        result: the whole answer, once the last piece is out.
    """

    def __init__(self, generator: Generator, prompt: Prompt, settings: GenerationSettings) -> None:
        self.result: Generated | None = None
        self._generator = generator
        self._prompt = prompt
        self._settings = settings
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._cancelled = threading.Event()

    def __iter__(self) -> Iterator[str]:
        """Yields the pieces of the answer.

        Raises:
            ChatBindError: whatever went wrong while generating.
        """
        with ThreadPoolExecutor(max_workers=1) as pool:
            future = pool.submit(self._work)
            try:
                while (piece := self._pieces.get()) is not None:
                    yield piece
                self.result = future.result()
            finally:
                self._cancelled.set()

    def _work(self) -> Generated:
        try:
            return self._generator.stream(
                self._prompt, self._settings, self._pieces.put, self._cancelled
            )
        finally:
            self._pieces.put(None)


def _asked(question: str, media: Sequence[MediaLike]) -> Asked:
    return Asked(question, tuple(m if isinstance(m, Medium) else Medium(None, m) for m in media))


def _certain(prepared: Prepared | ChatBindError) -> Prepared:
    if isinstance(prepared, ChatBindError):
        raise prepared
    return prepared


def _percepts(items: Sequence[Percept | ChatBindError]) -> list[Percept]:
    return [item for item in items if isinstance(item, Percept)]


def _mixed(percepts: Sequence[Percept], weights: Sequence[float]) -> Percept:
    """The weighted sum of embeddings of norm 1, brought to norm 1.

    Source: ImageBind (Girdhar et al., CVPR 2023), section 5: embeddings of different modalities
    can be added up.
    """
    rows = functional.normalize(torch.stack([p.embedding for p in percepts]), dim=-1)
    total = (rows * torch.tensor(weights).unsqueeze(-1)).sum(dim=0)
    return Percept(percepts[0].modality, None, functional.normalize(total, dim=-1))

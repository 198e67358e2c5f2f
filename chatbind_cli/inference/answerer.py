"""Questions about media, answered: the library's front door.

answerer = Answerer.from_pretrained("model", encoder="imagebind")
print(answerer.answer("What is this?", ["photo.jpg"]))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from chatbind_cli.data.decoders import Loaded
from chatbind_cli.data.tokens import PromptEncoder, TokenizedSample
from chatbind_cli.errors import ChatBindError, RecordError, contained
from chatbind_cli.inbox import Inbox
from chatbind_cli.inference.decoding import Generated, Outcome
from chatbind_cli.inference.engine import Engine, check_length, check_text
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.loaded_model import LoadedModel, load_model
from chatbind_cli.inference.local_engine import LocalEngine
from chatbind_cli.inference.media_encoder import MediaEncoder, StoredEmbeddings
from chatbind_cli.inference.preparing import Preparation, Read
from chatbind_cli.inference.questions import Question
from chatbind_cli.inference.schedule import WINDOW
from chatbind_cli.inference.stream import Stream
from chatbind_cli.media.medium import Medium
from chatbind_cli.model.config import encoder_of
from chatbind_cli.model.turns import Turn, dialogue, with_media

MediaLike = str | Path | bytes | Medium


class Answerer:
    """A ChatBind model that answers questions.

    Unless said otherwise, with its own encoder, in the prompt style that it was trained in, and
    with the language model here, which makes up to `batch_size` answers together. In a `run`,
    `readers` threads read media.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        media_encoder: MediaEncoder | StoredEmbeddings | None = None,
        *,
        style: str | None = None,
        engine: Engine | None = None,
        batch_size: int = 16,
        readers: int = 1,
    ) -> None:
        self.model: Any = loaded.bundle.model
        self.media_encoder = media_encoder or MediaEncoder(loaded)
        self.prompts = PromptEncoder(loaded.bundle.tokenizer, loaded.bundle.config, style)
        self.engine = engine or LocalEngine(
            self.model,
            loaded.bundle.tokenizer,
            stop_ids=self.prompts.stop_token_ids,
            stops=self.prompts.stop_strings,
            batch_size=batch_size,
        )
        self._batch_size = batch_size
        self._readers = readers

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        projector: str | Path | None = None,
        base: str | Path | None = None,
        encoder: str | Path | Sequence[str | Path] = (),
        device: str = "auto",
        dtype: str = "auto",
        attn_implementation: str = "auto",
    ) -> Answerer:
        """Loads a ChatBind folder, or a language model and the projector that goes with it.

        See `load_model`, and `--help` of `ask`, for what else may be said.

        Raises:
            ChatBindError: something is not there, or does not fit.
        """
        return cls(
            load_model(
                Path(path),
                projector=None if projector is None else Path(projector),
                base=None if base is None else Path(base),
                encoders=[encoder] if isinstance(encoder, (str, Path)) else encoder,
                device=device,
                dtype=dtype,
                attn_implementation=attn_implementation,
            )
        )

    def answer(
        self,
        question: str,
        media: Sequence[MediaLike] = (),
        *,
        history: Sequence[Turn] = (),
        settings: GenerationSettings = GenerationSettings(),  # noqa: B008 (frozen)
    ) -> str:
        """The answer to one question.

        Args:
            question: its words.
            media: paths, URLs, bytes, or media with a modality and weight.
            history: earlier questions (the `turn` of what `prepare` gave) and answers, in turn.
            settings: how to generate.

        Raises:
            ChatBindError: a medium cannot be read, or the question does not fit the model.
        """
        [prepared] = self.prepare([_question(question, media)], history=history)
        [generated] = self.generate([prepared], settings)
        return generated.text

    def stream(
        self,
        question: str,
        media: Sequence[MediaLike] = (),
        *,
        history: Sequence[Turn] = (),
        settings: GenerationSettings = GenerationSettings(),  # noqa: B008 (frozen)
    ) -> Iterator[str]:
        """The answer to one question, piece by piece as it is generated. See `answer`."""
        [prepared] = self.prepare([_question(question, media)], history=history)
        return iter(Stream(self.engine, prepared, settings))

    def answer_batch(
        self,
        questions: Sequence[tuple[str, Sequence[MediaLike]]],
        *,
        settings: GenerationSettings = GenerationSettings(),  # noqa: B008 (frozen)
    ) -> list[str]:
        """The answers to several questions (words and media of each), generated together."""
        asked = [
            _question(text, media, identity) for identity, (text, media) in enumerate(questions)
        ]
        prepared = self.prepare(asked)
        return [generated.text for generated in self.generate(prepared, settings)]

    def prepare(
        self, questions: Sequence[Question], *, history: Sequence[Turn] = ()
    ) -> list[Question]:
        """Embeds the media of questions and puts their prompts together, with the same history.

        Returns:
            Each with a `prompt`, or with a `problem` that says why it cannot be asked.

        Raises:
            ChatBindError: no question with media can be asked, since the encoder is not there.
        """
        return self._embedded([(question, self._read(question)) for question in questions], history)

    def _read(self, question: Question) -> list[Loaded]:
        if question.problem or question.given_up:
            return []
        return self.media_encoder.read(question.media)

    def _embedded(self, read: Sequence[Read], history: Sequence[Turn] = ()) -> list[Question]:
        """Questions whose media were read, each with its prompt or its problem."""
        read = [
            (replace(question, problem=problem), [])
            if (problem := question.problem or question.given_up)
            else (question, loaded)
            for question, loaded in read
        ]
        media = [m for question, _ in read if not question.problem for m in question.media]
        loaded = [one for _, own in read for one in own]
        embedded = iter(self.media_encoder.encode(media, loaded))
        return [
            self._prepared(question, list(islice(embedded, len(own))), history)
            for question, own in read
        ]

    def run(
        self, questions: Inbox[Question], settings: GenerationSettings
    ) -> Iterator[tuple[Question, Outcome]]:
        """Answers questions as they come, each as soon as it is done, in any order.

        Media of the next ones are read and embedded meanwhile. What a question says itself
        (`Question.settings`) goes before `settings`.

        Yields:
            Each question, prepared, and its answer, or why there is none.

        Raises:
            ChatBindError: nothing more can be answered (the encoder is not there); or the error
                that the questions ended with, once all others are answered.
        """
        with Preparation(
            questions,
            read=self._read,
            prepare=self._embedded,
            readers=self._readers,
            together=self._batch_size,
            room=WINDOW * self._batch_size,
        ) as ready:
            for question, outcome in self.engine.run(ready, settings):
                yield question, _counted(question, outcome)

    def generate(
        self, questions: Sequence[Question], settings: GenerationSettings
    ) -> list[Generated]:
        """The answers to prepared questions, in order.

        Raises:
            ChatBindError: the `problem` of one of them, or what became of one.
        """
        inbox: Inbox[Question] = Inbox(len(questions))
        for question in questions:
            inbox.put(question)
        inbox.close()
        outcomes = {id(question): outcome for question, outcome in self.engine.run(inbox, settings)}
        return [_answer(outcomes[id(question)]) for question in questions]

    def _prepared(
        self, question: Question, found: list[Medium | ChatBindError], history: Sequence[Turn]
    ) -> Question:
        if question.problem is not None:
            return question
        try:
            media: list[Medium] = []
            for medium in found:
                if isinstance(medium, ChatBindError):
                    raise medium
                media.append(medium)
            earlier = (text for _, text in question.earlier)
            said = "".join((question.text, question.system or "", *earlier))
            check_text(said, self.engine.longest_context)
            read = [self._mixed(media)] if question.mix and media else media
            own = (
                with_media(question.turns, read)
                if question.turns
                else dialogue(question.earlier, question.text, read, where=question.where)
            )
            turns = [*history, *own]
            prompt = self.prompts.prompt(turns, question.system)
            check_length(len(prompt.input_ids), self.engine.longest_context)
            choice_ids = self._choice_ids(question, turns, prompt)
        except Exception as error:
            problem = contained(error, where=question.where or "the question")
            return replace(question, problem=problem)
        told = question.media if question.mix else tuple(media)
        return replace(question, media=told, turn=turns[-1], prompt=prompt, choice_ids=choice_ids)

    def _mixed(self, media: Sequence[Medium]) -> Medium:
        """The weighted sum of embeddings of norm 1, brought to norm 1.

        Source: ImageBind (Girdhar et al., CVPR 2023), section 5: embeddings of different modalities
        can be added up.

        Raises:
            RecordError: they lie in the spaces of several encoders.
        """
        rows = torch.stack([m.embedding for m in media if m.embedding is not None])
        each = rows.split(encoder_of(self.model.config).widths, dim=-1)
        if sum(bool(own.any()) for own in each) > 1:
            raise RecordError("embeddings of several encoders cannot be mixed: they share no space")
        weights = torch.tensor([medium.weight for medium in media])
        total = (functional.normalize(rows, dim=-1) * weights.unsqueeze(-1)).sum(dim=0)
        return replace(media[0], weight=1.0, embedding=functional.normalize(total, dim=-1))

    def _choice_ids(
        self, question: Question, turns: Sequence[Turn], prompt: TokenizedSample
    ) -> tuple[list[int], ...]:
        """The token ids of the question's choices.

        Raises:
            RecordError: one does not fit into the model's context.
        """
        found = []
        longest = self.engine.longest_context
        for number, text in enumerate(question.choices, start=1):
            check_text(text, longest)
            ids = self.prompts.answer(turns, text, question.system)
            if longest is not None and len(prompt.input_ids) + len(ids) > longest:
                raise RecordError(
                    f"the prompt has {len(prompt.input_ids)} tokens, choice {number} has "
                    f"{len(ids)}, and the model reads {longest} at most"
                )
            found.append(ids)
        return tuple(found)


def _question(text: str, media: Sequence[MediaLike], identity: int | None = None) -> Question:
    read = tuple(m if isinstance(m, Medium) else Medium(None, m) for m in media)
    return Question(text, read, id=identity)


def _counted(question: Question, outcome: Outcome) -> Outcome:
    """An answer that tells how many tokens were read for it."""
    if isinstance(outcome, ChatBindError) or question.prompt is None:
        return outcome
    return replace(outcome, n_prompt=len(question.prompt.input_ids))


def _answer(outcome: Outcome) -> Generated:
    if isinstance(outcome, ChatBindError):
        raise outcome
    return outcome

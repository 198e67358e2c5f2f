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

from chatbind_cli.data.tokens import PromptEncoder, TokenizedSample
from chatbind_cli.errors import ChatBindError, RecordError, contained
from chatbind_cli.inference.choices import likeliest
from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.generation import Generator, Stream
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.loaded_model import LoadedModel, load_model
from chatbind_cli.inference.media_encoder import MediaEncoder, StoredEmbeddings
from chatbind_cli.inference.questions import Question
from chatbind_cli.media.medium import Medium
from chatbind_cli.model.turns import Turn, dialogue

MediaLike = str | Path | bytes | Medium


class Answerer:
    """A ChatBind model that answers questions.

    Unless said otherwise, with its own encoder, and in the prompt style that it was trained in.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        media_encoder: MediaEncoder | StoredEmbeddings | None = None,
        *,
        style: str | None = None,
    ) -> None:
        self.model: Any = loaded.bundle.model
        self.media_encoder = media_encoder or MediaEncoder(loaded)
        self.prompts = PromptEncoder(loaded.bundle.tokenizer, loaded.bundle.config, style)
        self.generator = Generator(
            self.model,
            loaded.bundle.tokenizer,
            stop_ids=self.prompts.stop_token_ids,
            stops=self.prompts.stop_strings,
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        projector: str | Path | None = None,
        base: str | Path | None = None,
        encoder: str | Path | None = None,
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
                encoder=None if encoder is None else Path(encoder),
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
        return iter(self.stream_prepared(prepared, settings))

    def answer_batch(
        self,
        questions: Sequence[tuple[str, Sequence[MediaLike]]],
        *,
        settings: GenerationSettings = GenerationSettings(),  # noqa: B008 (frozen)
    ) -> list[str]:
        """The answers to several questions (words and media of each), generated together."""
        prepared = self.prepare([_question(text, media) for text, media in questions])
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
        media = [medium for question in questions for medium in question.media]
        embedded = iter(self.media_encoder.embed(media))
        return [
            self._prepared(question, list(islice(embedded, len(question.media))), history)
            for question in questions
        ]

    def generate(
        self,
        questions: Sequence[Question],
        settings: GenerationSettings,
        *,
        salt: str = "",
    ) -> list[Generated]:
        """Answers prepared questions together; see `Generator.answers`.

        Raises:
            ChatBindError: the `problem` of one of them.
        """
        if any(question.choices for question in questions):
            return [likeliest(self.model, question) for question in questions]
        return self.generator.answers([_prompt(q) for q in questions], settings, salt=salt)

    def stream_prepared(self, question: Question, settings: GenerationSettings) -> Stream:
        """Answers a prepared question piece by piece.

        Raises:
            ChatBindError: its `problem`.
        """
        return self.generator.stream(_prompt(question), settings)

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
            self.generator.check_text("".join((question.text, question.system or "", *earlier)))
            read = [_mixed(media)] if question.mix and media else media
            own = dialogue(question.earlier, question.text, read, where=question.where)
            turns = [*history, *own]
            prompt = self.prompts.prompt(turns, question.system)
            self.generator.check_length(prompt)
            choice_ids = self._choice_ids(question, turns, prompt)
        except Exception as error:
            problem = contained(error, where=question.where or "the question")
            return replace(question, problem=problem)
        told = question.media if question.mix else tuple(media)
        return replace(question, media=told, turn=turns[-1], prompt=prompt, choice_ids=choice_ids)

    def _choice_ids(
        self, question: Question, turns: Sequence[Turn], prompt: TokenizedSample
    ) -> tuple[list[int], ...]:
        """The token ids of the question's choices.

        Raises:
            RecordError: one does not fit into the model's context.
        """
        found = []
        longest = self.generator.longest_context
        for number, text in enumerate(question.choices, start=1):
            self.generator.check_text(text)
            ids = self.prompts.answer(turns, text, question.system)
            if longest is not None and len(prompt.input_ids) + len(ids) > longest:
                raise RecordError(
                    f"the prompt has {len(prompt.input_ids)} tokens, choice {number} has "
                    f"{len(ids)}, and the model reads {longest} at most"
                )
            found.append(ids)
        return tuple(found)


def _question(text: str, media: Sequence[MediaLike]) -> Question:
    return Question(text, tuple(m if isinstance(m, Medium) else Medium(None, m) for m in media))


def _prompt(question: Question) -> TokenizedSample:
    if question.problem is not None:
        raise question.problem
    assert question.prompt is not None, "the question was not prepared"
    return question.prompt


def _mixed(media: Sequence[Medium]) -> Medium:
    """The weighted sum of embeddings of norm 1, brought to norm 1.

    Source: ImageBind (Girdhar et al., CVPR 2023), section 5: embeddings of different modalities
    can be added up.
    """
    rows = torch.stack([m.embedding for m in media if m.embedding is not None])
    weights = torch.tensor([medium.weight for medium in media])
    total = (functional.normalize(rows, dim=-1) * weights.unsqueeze(-1)).sum(dim=0)
    return replace(media[0], weight=1.0, embedding=functional.normalize(total, dim=-1))

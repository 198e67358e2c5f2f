"""Prompts in, answers out: the one place where the language model generates.

A prompt is token ids, and the media in it with their embeddings.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from chatbind_cli.data.tokens import TokenizedSample
from chatbind_cli.errors import RecordError
from chatbind_cli.inference.decoding import AnswerDecoder, AnswerEnds, Generated, TextStreamer
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.model.config import end_ids

# Long runs of blanks or dashes are single tokens in some vocabularies; text is far below this.
_MOST_CHARACTERS_A_TOKEN = 256


class Generator:
    """A ChatBind model that answers prompts.

    How is decided by `GenerationSettings` alone: of the model's own generation settings only the
    end tokens count, and the others are dropped from it. In the model's prompt style `stop_ids`
    and the texts `stops` end an answer, too.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, stop_ids: Sequence[int], stops: Sequence[str] = ()
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._stops = tuple(stops)
        ends = {*stop_ids, *end_ids(model.generation_config.eos_token_id)}
        # `generate` fills from these whatever a call's own settings leave open
        self._own: GenerationConfig = model.config.generation(sorted(ends))
        model.generation_config = self._own
        self._end_ids = sorted(ends)
        pad = tokenizer.pad_token_id
        self._pad_id: int = pad if pad is not None else self._end_ids[0]

    @property
    def longest_context(self) -> int | None:
        """Tokens of prompt and answer together that the language model was made for, if known."""
        longest = getattr(self.model.config.text_config, "max_position_embeddings", None)
        return longest if isinstance(longest, int) and longest > 0 else None

    def check_text(self, text: str) -> None:
        """Refuses a question that cannot fit, before a tokenizer takes gigabytes to find that out.

        Raises:
            RecordError: it has more characters than any tokenizer packs into the model's context.
        """
        longest = self.longest_context
        if longest is not None and len(text) > longest * _MOST_CHARACTERS_A_TOKEN:
            raise RecordError(
                f"the question has {len(text):,} characters, and the model reads {longest} tokens "
                "at most",
                hint="shorten the question",
            )

    def check_length(self, prompt: TokenizedSample) -> None:
        """Makes sure that there is room for an answer.

        Raises:
            RecordError: the prompt fills the model's context.
        """
        longest = self.longest_context
        length = len(prompt.input_ids)
        if longest is not None and length >= longest:
            raise RecordError(
                f"the prompt has {length} tokens, and the model reads "
                f"{longest} at most, the answer included",
                hint="shorten the question",
            )

    def answers(
        self, prompts: Sequence[TokenizedSample], settings: GenerationSettings, *, salt: str = ""
    ) -> list[Generated]:
        """Answers several prompts at once, padded on the left.

        `salt`, with `settings.seed`, decides what sampling draws: give each batch its own.
        """
        decoder = self._decoder(settings)
        longest = self.longest_context

        def goes_alone(prompt: TokenizedSample) -> bool:
            """Whether its answer may reach the end of the context, and would cut others short."""
            needed = len(prompt.input_ids) + settings.max_new_tokens
            return longest is not None and needed > longest

        together = [prompt for prompt in prompts if not goes_alone(prompt)]
        rows = iter(self._run(together, settings, decoder, salt) if together else [])
        answers = []
        for prompt in prompts:
            alone = goes_alone(prompt)
            ids = self._run([prompt], settings, decoder, salt)[0] if alone else next(rows)
            answers.append(decoder.finished(ids))
        return answers

    def stream(self, prompt: TokenizedSample, settings: GenerationSettings) -> Stream:
        """Answers one prompt piece by piece; beam search knows its answer only at the end."""
        decoder = self._decoder(settings)
        return Stream(decoder, partial(self._run, [prompt], settings, decoder))

    def _run(
        self,
        prompts: Sequence[TokenizedSample],
        settings: GenerationSettings,
        decoder: AnswerDecoder,
        salt: str = "",
        *,
        streamer: TextStreamer | None = None,
        cancelled: threading.Event | None = None,
    ) -> list[list[int]]:
        """The new token ids of each prompt, end tokens and padding included."""
        device = self.model.device
        rows = [torch.tensor(prompt.input_ids) for prompt in prompts]
        # on the left, so that the next token of every row stands at the same position
        padded = pad_sequence(rows, True, self._pad_id, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], True, padding_side="left")
        length = padded.shape[1]
        media = [medium for prompt in prompts for medium in prompt.media]
        embeddings = [medium.embedding for medium in media if medium.embedding is not None]
        weights = torch.tensor([medium.weight for medium in media], device=device)
        ends = AnswerEnds(decoder, length, cancelled or threading.Event())
        with torch.inference_mode(), _seeded(settings, salt, device):
            output = self.model.generate(
                input_ids=padded.to(device),
                attention_mask=mask.to(device),
                media_embeddings=torch.stack(embeddings).to(device) if media else None,
                media_weights=weights if media else None,
                generation_config=self._config(settings, length),
                logits_processor=LogitsProcessorList([_Finite()]),
                stopping_criteria=StoppingCriteriaList([ends]),
                streamer=streamer if settings.num_beams == 1 else None,
            )
        return output[:, length:].tolist()

    def _config(self, settings: GenerationSettings, prompt_length: int) -> GenerationConfig:
        """The library's own words for the settings."""
        room = settings.max_new_tokens
        if self.longest_context is not None:
            room = max(1, min(room, self.longest_context - prompt_length))
        values: dict[str, Any] = {
            "max_new_tokens": room,
            "num_beams": settings.num_beams,
            "do_sample": settings.sampled,
            "pad_token_id": self._pad_id,
            "eos_token_id": self._own.eos_token_id,
            "suppress_tokens": self._own.suppress_tokens,
            "bos_token_id": self.tokenizer.bos_token_id,
        }
        if settings.sampled:
            # top_k 0: all tokens are drawn from; the library's own default would be 50
            values |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        return GenerationConfig(**values)

    def _decoder(self, settings: GenerationSettings) -> AnswerDecoder:
        return AnswerDecoder(self.tokenizer, self._end_ids, (*self._stops, *settings.stop))


class Stream:
    """An answer that grows: iterate over its pieces, then read `result`, which is the whole.

    The model works in a thread of its own. Leaving the loop early, by an interrupt too, ends the
    answer after the token at hand.
    """

    def __init__(self, decoder: AnswerDecoder, run: Callable[..., list[list[int]]]) -> None:
        self.result: Generated | None = None
        self._decoder = decoder
        self._run = run
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
        streamer = TextStreamer(self._decoder, self._pieces.put)
        try:
            [ids] = self._run(streamer=streamer, cancelled=self._cancelled)
            generated = self._decoder.finished(ids)
            streamer.show(generated.text)
            return generated
        finally:
            self._pieces.put(None)


class _Finite(LogitsProcessor):
    """Refuses scores that are not finite: the likeliest of them would be an empty answer."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """The scores as they are.

        Raises:
            RecordError: one is NaN or infinite (minus infinity says "never").
        """
        if not bool((scores < float("inf")).all()):
            raise RecordError("the model's numbers for this question are not finite")
        return scores


@contextmanager
def _seeded(settings: GenerationSettings, salt: str, device: torch.device) -> Iterator[None]:
    """Seeds what sampling draws from, and leaves the program's own random state as it was."""
    if not settings.sampled:
        yield
        return
    digest = hashlib.sha256(f"{settings.seed}\0{salt}".encode()).digest()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        yield

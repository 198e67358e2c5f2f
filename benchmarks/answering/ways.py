"""The ways to answer questions, and a dialogue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import httpx
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import StoppingCriteria

from answering.world import World
from chatbind_cli.inbox import Inbox
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.questions import Question
from chatbind_cli.inference.stream import Stream
from chatbind_cli.model.turns import GPT, Turn

TURNS = 9
SEATS = 64
"""Questions that an engine has at a time, as many as `--engine` gives it."""


class _Lengths(StoppingCriteria):
    """Ends each row at its own length."""

    def __init__(self, world: World, prompt: int, wanted: Sequence[int]) -> None:
        self._world, self._prompt = world, prompt
        self._wanted = torch.tensor(wanted)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._world.first_token = self._world.first_token or self._world.since()
        return (input_ids.shape[1] - self._prompt >= self._wanted).to(input_ids.device)


@torch.inference_mode()
def plain(world: World, batch: int) -> None:
    """`generate` of transformers with fixed batches in the order of the file, padded on the left.

    What `vqa` did before; with batches of one, what the reference does.
    """
    loaded = world.load()
    answerer = world.answerer(loaded)
    model: Any = loaded.bundle.model
    tokenizer, device = loaded.bundle.tokenizer, model.device
    model.generate(torch.ones(1, 4, dtype=torch.long, device=device), max_new_tokens=2)  # warm
    world.begin()
    for start in range(0, len(world.questions), batch):
        asked = answerer.prepare(world.questions[start : start + batch])
        prompts = [q.prompt for q in asked if q.prompt is not None]
        wanted = [q.settings.max_new_tokens for q in asked if q.settings is not None]
        rows = [torch.tensor(prompt.input_ids) for prompt in prompts]
        ids = pad_sequence(rows, True, 2, padding_side="left").to(device)
        mask = pad_sequence([torch.ones_like(r) for r in rows], True, padding_side="left")
        found = [m.embedding for p in prompts for m in p.media if m.embedding is not None]
        output = model.generate(
            input_ids=ids,
            attention_mask=mask.to(device),
            media_embeddings=torch.stack(found).to(device),
            max_new_tokens=max(wanted),
            do_sample=False,
            pad_token_id=2,
            stopping_criteria=[_Lengths(world, ids.shape[1], wanted)],
        )
        for question, row, length in zip(asked, output[:, ids.shape[1] :], wanted, strict=True):
            text = tokenizer.decode(row[:length], skip_special_tokens=True).strip()
            world.took(question, text, int((row[:length] != 2).sum()))


def rows(world: World, batch: int, *, shared: bool = True) -> None:
    """The engine here; `shared`: whether what prompts begin with is read once."""
    answerer = world.answerer(batch_size=batch)
    if not shared:
        answerer.engine._prefill.learn = lambda prompts: None
    run(world, answerer)


def run(world: World, answerer: Answerer) -> None:
    """Answers all questions as `vqa` does."""
    answerer.generate(answerer.prepare(world.questions[:1]), GenerationSettings())  # warm
    inbox: Inbox[Question] = Inbox(len(world.questions))
    for question in world.questions:
        inbox.put(question)
    inbox.close()
    world.begin()
    for question, outcome in answerer.run(inbox, GenerationSettings()):
        if isinstance(outcome, Exception):
            raise outcome
        world.took(question, outcome.text, outcome.n_tokens)


def engine(world: World) -> None:
    """`--engine`: the language model is in another program."""
    from chatbind_cli.inference.front import load_front  # noqa: PLC0415  the other ways
    from chatbind_cli.inference.remote_engine import RemoteEngine  # noqa: PLC0415  need neither

    front = load_front(world.folder / "model")
    with RemoteEngine(front, [str(world.url)], in_flight=SEATS) as remote:
        run(world, world.answerer(front, engine=remote))


def texts(world: World) -> None:
    """The same program's own prompts of words, equally long and equally many at a time."""
    loaded = world.load()
    patch = loaded.bundle.config.im_patch_id
    asked = world.answerer(loaded).prepare(world.questions)

    async def ask(client: httpx.AsyncClient, question: Question) -> int:
        assert question.prompt is not None and question.settings is not None
        word = 3 + int(question.id or 0)  # in place of the medium's
        ids = [word if token == patch else token for token in question.prompt.input_ids]
        body = {"model": "lm", "prompt": ids, "max_tokens": question.settings.max_new_tokens}
        body |= {"temperature": 0, "ignore_eos": True}
        answer = (await client.post(f"{world.url}/completions", json=body)).json()
        return int(answer["usage"]["completion_tokens"])

    async def ask_all() -> None:
        seats = asyncio.Semaphore(SEATS)

        async def take(client: httpx.AsyncClient, question: Question) -> None:
            async with seats:
                world.took(question, "", await ask(client, question))

        async with httpx.AsyncClient(timeout=None) as client:
            await ask(client, asked[0])  # warm
            world.begin()
            await asyncio.gather(*(take(client, question) for question in asked))

    asyncio.run(ask_all())


def chat(world: World) -> None:
    """A dialogue about a picture; then its last turn with nothing kept of the others."""
    loaded = world.load()
    answerer = world.answerer(loaded)
    streamed(answerer, answerer.prepare(world.questions[TURNS : TURNS + 1])[0])  # warm
    history: list[Turn] = []
    last: list[Question] = []
    world.begin()
    for turn, question in enumerate(world.questions[:TURNS]):
        asked = question if turn == 0 else replace(question, media=())
        last = answerer.prepare([asked], history=history)
        text, seconds = streamed(answerer, last[0])
        world.turns.append(seconds)
        assert last[0].turn is not None
        history += [last[0].turn, Turn(GPT, (text,))]
        assert last[0].prompt is not None
        world.context = len(last[0].prompt.input_ids)
    world.again = streamed(world.answerer(loaded), last[0])[1]


def streamed(answerer: Answerer, question: Question) -> tuple[str, float]:
    """An answer, and the seconds until its first piece."""
    assert question.settings is not None
    began, first = time.perf_counter(), 0.0
    stream = Stream(answerer.engine, question, question.settings)
    for _ in stream:
        first = first or time.perf_counter() - began
    assert stream.result is not None
    return stream.result.text, first


WAYS: dict[str, tuple[Callable[[World], None], int]] = {
    "one by one": (partial(plain, batch=1), 10),
    "batches of 16": (partial(plain, batch=16), 1),
    "rows 16": (partial(rows, batch=16), 1),
    "rows 16, beginning not shared": (partial(rows, batch=16, shared=False), 1),
    "rows 4": (partial(rows, batch=4), 4),
    "rows 64": (partial(rows, batch=64), 1),
    "engine": (engine, 1),
    "engine, its own prompts": (texts, 1),
    "chat": (chat, 1),
}
"""What answers questions, and the share of them that it answers: one in so many."""

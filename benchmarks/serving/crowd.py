"""Clients of a server, all at once: those who ask and wait, and those who make trouble."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

_LIMIT_S = 120  # for an answer; one that takes longer is lost
MODALITIES = ("image", "video", "audio", "depth", "thermal", "imu")


@dataclass(frozen=True)
class Asked:
    """A question, and the answer that `vqa` gives to it."""

    text: str
    modality: str
    path: str
    answer: str

    def body(self, **more: Any) -> dict[str, Any]:
        """The request."""
        medium = {"type": "media", "modality": self.modality, "url": self.path}
        content = [{"type": "text", "text": self.text}, medium]
        return {"messages": [{"role": "user", "content": content}], **more}


@dataclass
class Tally:
    """What the clients met."""

    answers: int = 0
    tokens: int = 0
    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """What must not be: another's answer, none, a broken request that is not refused."""
    troubles: Counter[str] = field(default_factory=Counter)

    def hear(self, asked: Asked, text: str) -> None:
        """Compares an answer."""
        if text != asked.answer:
            self.wrong.append(f"{asked.path}: {text[:60]!r} and not {asked.answer[:60]!r}")


@dataclass(frozen=True)
class Place:
    """Where the server is, what is asked there, and until when."""

    url: str
    questions: Sequence[Asked]
    until: float
    tally: Tally

    @property
    def over(self) -> bool:
        """Whether it is time to go."""
        return time.monotonic() > self.until


async def honest(place: Place, draw: random.Random) -> None:
    """Asks with OpenAI's own client, mostly in pieces, and reads as fast as it can."""
    tally = place.tally
    async with openai.AsyncOpenAI(
        base_url=f"{place.url}/v1", api_key="none", max_retries=0, timeout=_LIMIT_S
    ) as client:
        create: Any = client.chat.completions.create
        while not place.over:
            asked = draw.choice(place.questions)
            begun, extra = time.monotonic(), {"extra_body": asked.body(), "messages": []}
            try:
                if draw.random() < 0.25:
                    whole = await create(model="model", **extra)
                    text, usage = whole.choices[0].message.content, whole.usage
                else:
                    options = {"include_usage": True}
                    text, usage = "", None
                    async for chunk in await create(
                        model="model", stream=True, stream_options=options, **extra
                    ):
                        usage = chunk.usage or usage
                        piece = chunk.choices[0].delta.content if chunk.choices else None
                        if piece and not text:
                            tally.first_s.append(time.monotonic() - begun)
                        text += piece or ""
            except openai.OpenAIError as error:
                tally.wrong.append(f"{asked.path}: {type(error).__name__} {error}"[:200])
                continue
            tally.whole_s.append(time.monotonic() - begun)
            tally.answers += 1
            tally.tokens += usage.completion_tokens
            tally.hear(asked, text)


def _broken(asked: Asked) -> dict[str, bytes]:
    """Requests that are to be refused."""

    def changed(**more: Any) -> bytes:
        return json.dumps(asked.body(**more)).encode()

    def about(path: str, modality: str) -> bytes:
        return json.dumps(Asked("What?", modality, path, "").body()).encode()

    return {
        "no JSON": changed()[:-7],
        "nested too deeply": b"[" * 3000,
        "no such file": about("none.png", asked.modality),
        "outside": about("../../etc/passwd", "image"),
        "no medium": about("../toy.json", "image"),
        "no such modality": about(asked.path, "smell"),
        "no parameter": changed(warmth=1),
        "not possible": changed(temperature=-1),
        "too long": json.dumps(
            Asked("a " * 99_999, asked.modality, asked.path, "").body()
        ).encode(),
        "another model": changed(model="gpt-4"),
    }


async def broken(place: Place, draw: random.Random) -> None:
    """Sends what is no request, and looks that it is told so."""
    async with httpx.AsyncClient(timeout=_LIMIT_S) as client:
        while not place.over:
            name, body = draw.choice([*_broken(draw.choice(place.questions)).items()])
            try:
                reply = await client.post(f"{place.url}/v1/chat/completions", content=body)
            except httpx.HTTPError as error:
                place.tally.wrong.append(f"{name}: {error!r}")
                continue
            place.tally.troubles[f"broken: {name}"] += 1
            if reply.status_code not in (400, 404) or "error" not in reply.json():
                place.tally.wrong.append(f"{name}: {reply.status_code} {reply.text[:100]}")
            await asyncio.sleep(0.02)


async def slow(place: Place, draw: random.Random) -> None:
    """Sends a request in drips, or reads the answer a few bytes at a time; it must be right."""
    host, _, port = place.url.removeprefix("http://").partition(":")
    while not place.over:
        asked, sends = draw.choice(place.questions), draw.random() < 0.5
        body = json.dumps(asked.body(stream=True)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
        reader, writer = await asyncio.open_connection(host, int(port), limit=256)
        at_once = 40 if sends else len(request)
        for start in range(0, len(request), at_once):
            writer.write(request[start : start + at_once])
            await writer.drain()
            await asyncio.sleep(0.2 if sends else 0)
        reply = b""
        while part := await reader.read(1 << 16 if sends else 100):
            reply += part
            await asyncio.sleep(0 if sends else 0.05)
        writer.close()
        events = [line[6:] for line in reply.decode().splitlines() if line.startswith("data: {")]
        deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
        place.tally.hear(asked, "".join(delta.get("content") or "" for delta in deltas))
        place.tally.troubles["slow to send" if sends else "slow to read"] += 1


async def vanishing(place: Place, draw: random.Random) -> None:
    """Leaves without a word: before the answer, or in the middle of it."""
    async with httpx.AsyncClient(timeout=_LIMIT_S) as client:
        while not place.over:
            asked, patience = draw.choice(place.questions), draw.randrange(4)
            body = asked.body(stream=draw.random() < 0.7)
            with suppress(asyncio.TimeoutError):
                async with (
                    asyncio.timeout(draw.random() * 0.5),
                    client.stream("POST", f"{place.url}/v1/chat/completions", json=body) as reply,
                ):
                    async for _ in reply.aiter_bytes():
                        patience -= 1
                        if patience < 0:
                            break
            place.tally.troubles["vanished"] += 1


async def each_once(url: str, questions: Sequence[Asked]) -> Tally:
    """Asks each question once, so that the server has seen all media."""
    tally, seats = Tally(), asyncio.Semaphore(16)

    async def ask(client: httpx.AsyncClient, asked: Asked) -> None:
        async with seats:
            reply = await client.post(f"{url}/v1/chat/completions", json=asked.body())
        tally.answers += 1
        tally.hear(asked, reply.json()["choices"][0]["message"]["content"])

    async with httpx.AsyncClient(timeout=_LIMIT_S) as client, asyncio.TaskGroup() as group:
        for asked in questions:
            group.create_task(ask(client, asked))
    return tally


async def crowd(
    url: str, questions: Sequence[Asked], clients: int, seconds: float, seed: int = 0
) -> Tally:
    """So many clients for so many seconds: of twenty, two are broken, one slow, two vanish."""
    tally = Tally()
    place = Place(url, questions, time.monotonic() + seconds, tally)
    kinds: list[Callable[[Place, random.Random], Awaitable[None]]]
    kinds = [broken, vanishing, slow, *[honest] * 7, broken, vanishing, *[honest] * 8]
    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            kind: Any = kinds[number % len(kinds)]
            group.create_task(kind(place, random.Random(f"{seed} {number}")))
    return tally

"""Chats that an endpoint answers within a day, at half the price: OpenAI's Batch API.

What is ordered stands in a small file of ours before it is ordered, so that a run that ends at any
moment is continued without paying twice: the next one finds the batch by its input file.

Source: https://platform.openai.com/docs/guides/batch
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import openai

from chatbind_cli.console import note
from chatbind_cli.endpoint import Endpoint
from chatbind_cli.errors import ChatBindError, RecordError, reason
from chatbind_cli.files import replace_text
from chatbind_cli.json_text import parse_line
from chatbind_cli.jsonl import Record

_MOST_REQUESTS, _MOST_BYTES = 50_000, 200_000_000
_CHAT = "/v1/chat/completions"
_OVER = ("completed", "failed", "expired", "cancelled")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_PAGES = 20  # of 100 batches each, in which one is looked for
_LONGEST_NAME = 200
_KEPT = "what was ordered is kept: the same command goes on"


class Reply(NamedTuple):
    """What came of one request.

    Attributes:
        status: of HTTP; None: it was never sent.
        body: what was replied, or the line that says why nothing was.
        batch: the batch's id.
    """

    status: Any
    body: Record
    batch: str


class Batches:
    """The batches of one output file, in a file of ours beside it.

    Raises:
        RecordError: that file is none, or of the batches of somebody else than `who`.
    """

    def __init__(self, endpoint: Endpoint, path: Path, who: str) -> None:
        self._endpoint, self._path, self._who = endpoint, path, who
        self._orders = _read_orders(path, who) if path.exists() else []
        # by ids of requests: a line, and its batch
        self._lines: dict[str, tuple[bytes, str]] = {}

    async def hang_up(self) -> None:
        """Closes the connections."""
        await self._endpoint.close()

    @property
    def most_usd(self) -> float:
        """What those may cost whose replies are not there yet."""
        return sum(order["most_usd"] for order in self._orders if "taken" not in order)

    def pop(self, key: str) -> Reply | None:
        """The reply to a request, if there is one; it is not kept."""
        if key not in self._lines:
            return None
        line, batch = self._lines.pop(key)
        record: Record = json.loads(line)
        response = record.get("response")
        if isinstance(response, dict) and isinstance(response.get("body"), dict):
            return Reply(response.get("status_code"), response["body"], batch)
        return Reply(None, record, batch)

    async def order(self, requests: Iterable[tuple[str, Record, float]]) -> None:
        """Orders replies to requests: ids of ours, bodies, and what each may cost in US dollars."""
        for lines, most_usd in _files(requests):
            with self._said("a file of requests"):
                uploaded = await self._endpoint.upload("/files", b"".join(lines), purpose="batch")
                order = {"file": _name(uploaded), "n": len(lines), "most_usd": most_usd}
                self._orders.append(order)
                self._save()
            await self._place(order)

    async def take(self, *, wait: bool) -> bool:
        """Fetches the replies of all batches that are over; tells whether all were, or waits.

        Raises:
            ChatBindError: a batch was refused as a whole, or the endpoint cannot be asked.
        """
        over = True
        for order in [order for order in self._orders if "taken" not in order]:
            await self._place(order)
            with self._said(f"batch {order['id']}"):
                batch = await self._over(order, wait)
                if batch is None:
                    over = False
                    continue
                for name in ("output_file_id", "error_file_id"):
                    if batch.get(name) is not None:
                        await self._fetch(batch[name], order["id"])
                why = self._endpoint.without_key(_why(batch))
            if batch["status"] == "failed":
                self._orders.remove(order)
                self._save()
                what = f"batch {order['id']} was refused{why}"
                raise ChatBindError(what, where=self._who, hint="nothing of it was answered")
            if batch["status"] != "completed":
                note(f"batch {order['id']} is {batch['status']}{why}")
            order["taken"] = True
        return over

    def forget(self) -> None:
        """Forgets batches whose replies are where they belong."""
        self._orders = [order for order in self._orders if "taken" not in order]
        self._save()

    async def _place(self, order: Record) -> None:
        """Orders the batch of a file, if it is not there; never twice."""
        if "id" in order:
            return
        with self._said(f"the batch of {order['file']}"):
            found = await self._find(order["file"])
            if found is None:
                body = {"input_file_id": order["file"], "endpoint": _CHAT}
                try:
                    found = await self._endpoint.post(
                        "/batches", {**body, "completion_window": "24h"}, once=True
                    )
                except (openai.APIConnectionError, openai.InternalServerError):
                    await asyncio.sleep(_FIRST_PAUSE_S)
                    found = await self._find(order["file"])  # it may be there all the same
                    if found is None:
                        raise
            order["id"] = _name(found)
            self._save()
        note(f"batch {order['id']}: {order['n']:,} requests, to be answered within a day")

    async def _find(self, file: str) -> Record | None:
        """The batch of an input file."""
        after = ""
        for _ in range(_PAGES):
            page = await self._endpoint.get(f"/batches?limit=100{after}")
            for batch in page["data"]:
                if batch["input_file_id"] == file:
                    return batch
            if not page.get("has_more"):
                break
            after = f"&after={quote(_name(page['data'][-1]), safe='')}"
        return None

    async def _over(self, order: Record, wait: bool) -> Record | None:
        """The batch once it is over; None: it is not, and nobody waits."""
        pause, said = _FIRST_PAUSE_S, ""
        while True:
            batch: Record = await self._endpoint.get(f"/batches/{quote(order['id'], safe='')}")
            if batch["status"] in _OVER:
                return batch
            done = (batch.get("request_counts") or {}).get("completed", 0)
            text = f"batch {order['id']}: {batch['status']:.40}, {done:,} of {order['n']:,} done"
            if text != said:
                note(text)
                said = text
            if not wait:
                return None
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE_S)

    async def _fetch(self, file: str, batch: str) -> None:
        """Takes the lines of a file of replies; whatever else stands in it is left there."""
        data = await self._endpoint.download(f"/files/{quote(file, safe='')}/content")
        for line in data.split(b"\n"):
            record, _, _, problem = parse_line(line, file)
            key = record.get("custom_id")
            if problem is None and isinstance(key, str):
                self._lines[key] = line, batch

    def _save(self) -> None:
        if not self._orders:
            self._path.unlink(missing_ok=True)
            return
        kept = [{k: v for k, v in order.items() if k != "taken"} for order in self._orders]
        replace_text(self._path, json.dumps({"batches_of": self._who, "orders": kept}) + "\n")

    @contextmanager
    def _said(self, what: str) -> Iterator[None]:
        """Makes one line of what the endpoint fails with, or says that nobody understands."""
        try:
            yield
        except openai.APIError as error:
            # without its cause: a server's own words may hold the key
            text = self._endpoint.in_words(error)
            raise ChatBindError(f"{what}: {text}", where=self._who, hint=_KEPT) from None
        except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
            said = f"{what}: a reply that no Batch API gives ({type(error).__name__})"
            text = f"{what}: {reason(error)}" if isinstance(error, OSError) else said
            raise ChatBindError(text, where=self._who, hint=_KEPT) from error


def _files(requests: Iterable[tuple[str, Record, float]]) -> Iterator[tuple[list[bytes], float]]:
    """The lines of files of the size that an endpoint takes, and what each may cost."""
    lines: list[bytes] = []
    size, usd = 0, 0.0
    for key, body, most_usd in requests:
        request = {"custom_id": key, "method": "POST", "url": _CHAT, "body": body}
        line = f"{json.dumps(request)}\n".encode()
        if lines and (len(lines) == _MOST_REQUESTS or size + len(line) > _MOST_BYTES):
            yield lines, usd
            lines, size, usd = [], 0, 0.0
        lines.append(line)
        size, usd = size + len(line), usd + most_usd
    if lines:
        yield lines, usd


def _read_orders(path: Path, who: str) -> list[Record]:
    """What an earlier run has ordered."""
    kinds = {"file": str, "n": int, "most_usd": float, "id": str}
    try:
        record = json.loads(path.read_bytes())
        owner = str(record["batches_of"])
        orders = [{key: kinds[key](value) for key, value in o.items()} for o in record["orders"]]
        good = all(order.keys() | {"id"} == kinds.keys() for order in orders)
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
        good = False
    if not good:
        what = "is no file of the batches of a review"
        raise RecordError(what, where=str(path), hint="move it away, or name another output")
    if owner != who:
        raise RecordError(
            f"has batches of {owner:.80}, and this run has {who}",
            where=str(path),
            hint="finish them with the command that ordered them, or remove the file",
        )
    return orders


def _name(value: Any) -> str:
    """The id of a file or batch.

    Raises:
        ValueError: it is none.
    """
    name = value["id"]
    if not isinstance(name, str) or not 0 < len(name) < _LONGEST_NAME or not name.isprintable():
        raise ValueError("no id")
    return name


def _why(batch: Record) -> str:
    """What a server says against a batch, to be put behind words of ours."""
    said = (batch.get("errors") or {}).get("data") or [{}]
    return f" ({reason(Exception(said[0].get('message')))})" if said[0] else ""

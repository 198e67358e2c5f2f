"""Chats that an endpoint answers within a day, at half the price: OpenAI's Batch API.

Requests go up in a file, replies come down in one. What was ordered stands in a small file of ours
before it is ordered, so that a run that ends at any moment is continued without paying twice: the
next one finds the batch by its input file.

Source: https://platform.openai.com/docs/guides/batch
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import quote

import httpx
import openai

from chatbind_cli.console import note
from chatbind_cli.endpoint import Endpoint
from chatbind_cli.errors import ChatBindError, RecordError, reason
from chatbind_cli.files import replace_file
from chatbind_cli.json_text import lines, parse_line
from chatbind_cli.jsonl import Record

_MOST_REQUESTS = 50_000
_MOST_BYTES = 200_000_000
_LARGEST_STATE = 1 << 20
_LONGEST_NAME = 200
_CHAT = "/v1/chat/completions"
_OVER = ("completed", "failed", "expired", "cancelled")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_PAGES = 20  # of 100 batches each, in which one is looked for
_ATTEMPTS = 3


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
    """The batches of one output file.

    Args:
        endpoint: where they are ordered.
        path: our file of them, beside the output.
        who: whose replies these are; a file of another's is refused.

    Raises:
        ChatBindError: the file is none, or somebody else's.
    """

    def __init__(self, endpoint: Endpoint, path: Path, who: str) -> None:
        self._endpoint, self._path, self._who = endpoint, path, who
        self._orders = _read_orders(path, who)
        self._replies = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  closed by `close`
        # where replies stand in it, by the ids of requests: start, end, batch
        self._places: dict[str, tuple[int, int, str]] = {}

    async def hang_up(self) -> None:
        """Closes the connections; replies stay."""
        await self._endpoint.close()

    def close(self) -> None:
        """Lets go of the replies."""
        self._replies.close()

    @property
    def most_usd(self) -> float:
        """What those may cost whose replies are not there yet."""
        return sum(order["most_usd"] for order in self._orders if "taken" not in order)

    def get(self, key: str) -> Reply | None:
        """The reply to a request, if there is one."""
        if key not in self._places:
            return None
        start, end, batch = self._places[key]
        self._replies.seek(start)
        line = json.loads(self._replies.read(end - start))
        response = line.get("response")
        if isinstance(response, dict) and isinstance(response.get("body"), dict):
            return Reply(response.get("status_code"), response["body"], batch)
        return Reply(None, line, batch)

    def drop(self, key: str) -> None:
        """Forgets the reply to a request that is to be ordered anew."""
        del self._places[key]

    async def order(self, requests: Iterable[tuple[str, Record, float]]) -> None:
        """Orders replies, in as many batches as it takes.

        Args:
            requests: ids of ours, bodies, and what each may cost in US dollars.
        """
        for file, count, most_usd in _files(requests, self._path.parent):
            with file, self._said("a file of requests"):
                uploaded = await self._endpoint.upload("/files", file, {"purpose": "batch"})
                # noted before anything is ordered
                order = {"file": _name(uploaded), "n": count, "most_usd": most_usd}
                self._orders.append(order)
                self._save()
            await self._place(order)

    async def take(self, *, wait: bool) -> bool:
        """Fetches the replies of all batches that are over, waiting for the others, or not.

        Returns:
            Whether all of them were over.

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
                    if isinstance(batch.get(name), str):
                        await self._fetch(batch[name], order)
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
                body["completion_window"] = "24h"
                try:
                    found = await self._endpoint.post("/batches", body, once=True)
                except (openai.APIConnectionError, openai.InternalServerError):
                    # it may be there all the same
                    await asyncio.sleep(_FIRST_PAUSE_S)
                    found = await self._find(order["file"])
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
            batches = page.get("data") if isinstance(page, dict) else None
            for batch in batches if isinstance(batches, list) else ():
                if batch["input_file_id"] == file:
                    return batch
            if not batches or not page.get("has_more"):
                break
            after = f"&after={quote(_name(batches[-1]), safe='')}"
        return None

    async def _over(self, order: Record, wait: bool) -> Record | None:
        """The batch once it is over; None: it is not, and nobody waits."""
        pause, said = _FIRST_PAUSE_S, ""
        while True:
            batch = await self._endpoint.get(f"/batches/{quote(order['id'], safe='')}")
            if not isinstance(batch["status"], str):
                raise TypeError("no status")
            if batch["status"] in _OVER:
                return batch
            counts = batch.get("request_counts")
            done = counts.get("completed", 0) if isinstance(counts, dict) else 0
            text = f"batch {order['id']}: {batch['status']}, {done} of {order['n']:,} are done"
            if text != said:
                note(self._endpoint.without_key(text)[:300])
                said = text
            if not wait:
                return None
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE_S)

    async def _fetch(self, file: str, order: Record) -> None:
        """Puts the lines of a file of replies behind those that are there."""
        for attempt in range(1, _ATTEMPTS + 1):
            with tempfile.TemporaryFile(dir=self._path.parent) as copy:
                try:
                    async for piece in self._endpoint.download(
                        f"/files/{quote(file, safe='')}/content"
                    ):
                        copy.write(piece)
                except httpx.TransportError:
                    if attempt == _ATTEMPTS:
                        raise
                    continue
                copy.seek(0)
                for line in lines(copy, file):
                    record, _, _, problem = parse_line(line, file)
                    key = record.get("custom_id")
                    if problem is None and isinstance(key, str):
                        start = self._replies.seek(0, 2)
                        self._replies.write(line)
                        self._places[key] = start, start + len(line), order["id"]
                return

    def _save(self) -> None:
        if not self._orders:
            self._path.unlink(missing_ok=True)
            return
        with replace_file(self._path) as temporary:
            kept = [{k: v for k, v in order.items() if k != "taken"} for order in self._orders]
            temporary.write_text(json.dumps({"batches_of": self._who, "orders": kept}) + "\n")

    @contextmanager
    def _said(self, what: str) -> Iterator[None]:
        """Makes one line of what the endpoint fails with, or says that nobody understands."""
        hint = "what was ordered is kept: the same command goes on"
        try:
            yield
        except (openai.APIError, httpx.HTTPError) as error:
            text = f"{what}: {self._endpoint.in_words(error)}"
            raise ChatBindError(text, where=self._who, hint=hint) from None
        except OSError as error:
            raise ChatBindError(f"{what}: {reason(error)}", where=self._who, hint=hint) from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            text = f"{what}: a reply that no Batch API gives ({type(error).__name__})"
            raise ChatBindError(text, where=self._who, hint=hint) from None


def _files(
    requests: Iterable[tuple[str, Record, float]], folder: Path
) -> Iterator[tuple[IO[bytes], int, float]]:
    """The requests as files of the size that an endpoint takes, with their number and cost."""
    file, count, usd = tempfile.TemporaryFile(dir=folder), 0, 0.0  # noqa: SIM115
    for key, body, most_usd in requests:
        request = {"custom_id": key, "method": "POST", "url": _CHAT, "body": body}
        line = f"{json.dumps(request)}\n".encode()
        if count == _MOST_REQUESTS or (count and file.tell() + len(line) > _MOST_BYTES):
            file.seek(0)
            yield file, count, usd
            file, count, usd = tempfile.TemporaryFile(dir=folder), 0, 0.0  # noqa: SIM115
        file.write(line)
        count, usd = count + 1, usd + most_usd
    file.seek(0)
    if count:
        yield file, count, usd
    file.close()


def _read_orders(path: Path, who: str) -> list[Record]:
    """What an earlier run has ordered.

    Raises:
        RecordError: the file is not ours, or another judge's.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        record, _, _, problem = parse_line(file.read(_LARGEST_STATE), str(path))
    orders = record.get("orders")
    good = isinstance(orders, list) and all(
        isinstance(order, dict)
        and isinstance(order.get("file"), str)
        and isinstance(order.get("id", ""), str)
        and type(order.get("n")) is int
        and isinstance(order.get("most_usd"), int | float)
        for order in orders
    )
    if problem is not None or not isinstance(orders, list) or not good:
        what = "is no file of the batches of a review"
        raise RecordError(what, where=str(path), hint="move it away, or name another output")
    if record.get("batches_of") != who:
        raise RecordError(
            f"has batches of {record.get('batches_of')!s:.80}, and this run has {who}",
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
    errors = batch.get("errors")
    data = errors.get("data") if isinstance(errors, dict) else None
    said = [error.get("message") for error in data or () if isinstance(error, dict)]
    return f" ({reason(Exception(said[0]))})" if said else ""

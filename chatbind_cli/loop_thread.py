"""An event loop in a second thread, for a caller whose own thread waits for other things."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any


@contextmanager
def loop_in_a_thread(name: str) -> Iterator[Callable[[Coroutine[Any, Any, Any]], Future[Any]]]:
    """Runs an event loop in a thread of that name; yields what hands a coroutine to it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name=name, daemon=True)
    thread.start()
    try:
        yield partial(asyncio.run_coroutine_threadsafe, loop=loop)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def cancel_others() -> None:
    """Cancels everything else that the loop has to do, and waits until it has ended."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)

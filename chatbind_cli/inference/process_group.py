"""The processes of a launch that work together: the first hands out batches, and gets the results.

The batches of a round go to the processes in order, and come back in order, so that the first
process writes what a single one would have written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from chatbind_cli import worker
from chatbind_cli.errors import ChatBindError

Work = TypeVar("Work")
Result = TypeVar("Result")

# a process may wait for days until somebody writes the next question into the pipe
_PATIENCE = timedelta(days=30)


class ProcessGroup:
    """The processes of a launch, or this one alone.

    Attributes:
        leads: whether this process hands out the work.
        size: how many batches are worked on at the same time.
    """

    def __init__(self) -> None:
        self.size = worker.world_size()
        self.leads = worker.rank() == 0
        if self.size > 1:
            # over gloo: what travels are questions and answers
            dist.init_process_group("gloo", timeout=_PATIENCE)

    def results(
        self, rounds: Iterable[Sequence[Work]], work: Callable[[Work], Result]
    ) -> Iterator[tuple[Work, Result]]:
        """Each batch with its result, in order; to be called in the leading process.

        A round holds up to `size` batches, and is asked for when the one before is done. Whatever
        ends the loop sends the others home.

        Raises:
            ChatBindError: what `work` raised, in whatever process.
        """
        try:
            for batches in rounds:
                shares = [[batch] for batch in batches]
                shares += [[] for _ in range(self.size - len(batches))]
                done = self._gather(_done(self._scatter(shares) or [], work))
                # processes beyond the last batch had nothing to do
                for batch, result in zip(batches, done, strict=False):
                    if isinstance(result, ChatBindError):
                        raise result
                    yield batch, result[0]
        finally:
            self._scatter([None] * self.size)

    def follow(self, work: Callable[[Work], Result]) -> None:
        """Works on what the leading process hands out, until it has no more."""
        share: list[Work] | None = self._scatter(None)
        while share is not None:
            self._gather(_done(share, work))
            share = self._scatter(None)

    def _scatter(self, shares: Sequence[list[Work] | None] | None) -> list[Work] | None:
        """Gives each process its share; returns this one's: one batch or none, None at the end."""
        if self.size == 1:
            return shares[0] if shares else None
        mine: list[list[Work] | None] = [None]
        dist.scatter_object_list(mine, None if shares is None else list(shares), src=0)
        return mine[0]

    def _gather(self, result: list[Result] | ChatBindError) -> list[list[Result] | ChatBindError]:
        """Everybody's results in the leader; elsewhere they mean nothing."""
        gathered = [result] * self.size
        if self.size > 1:
            dist.gather_object(result, gathered if self.leads else None, dst=0)
        return gathered

    def __enter__(self) -> ProcessGroup:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the group."""
        if self.size > 1:
            dist.destroy_process_group()


def _done(share: Sequence[Work], work: Callable[[Work], Result]) -> list[Result] | ChatBindError:
    """The results of a share; an error travels to the leader, which raises it."""
    try:
        return [work(batch) for batch in share]
    except ChatBindError as error:
        return error

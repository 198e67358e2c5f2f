"""Several processes that answer together: the first hands out batches and collects the answers.

The batches of a round go to the processes in order, and come back in order, so that the first
process writes what a single one would have written. Knows nothing of questions and answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Protocol, TypeVar

import torch.distributed as dist

from chatbind_cli import launch
from chatbind_cli.errors import ChatBindError

Work = TypeVar("Work")
Result = TypeVar("Result")

# a process may wait for days until somebody writes the next question into the pipe
_PATIENCE = timedelta(days=30)


class Crew(Protocol):
    """Whoever works on batches.

    Attributes:
        leads: whether this process reads the questions and writes the answers.
        size: how many batches are worked on at the same time.
    """

    leads: bool
    size: int

    def results(
        self, rounds: Iterable[Sequence[Work]], work: Callable[[Work], Result]
    ) -> Iterator[tuple[Work, Result]]:
        """Each batch with its result, in order; to be called in the leading process.

        Args:
            rounds: up to `size` batches each; a round is asked for when the one before is done.
            work: what is to be done with a batch.

        Raises:
            ChatBindError: what `work` raised, in whatever process.
        """
        ...

    def follow(self, work: Callable[[Work], Result]) -> None:
        """Works on what the leading process hands out, until it has no more."""
        ...

    def close(self) -> None:
        """Leaves the crew."""
        ...


class Alone:
    """A crew of one."""

    leads = True
    size = 1

    def results(
        self, rounds: Iterable[Sequence[Work]], work: Callable[[Work], Result]
    ) -> Iterator[tuple[Work, Result]]:
        """See `Crew.results`."""
        for batches in rounds:
            for batch in batches:
                yield batch, work(batch)

    def follow(self, work: Callable[[Work], Result]) -> None:
        """There is nobody to follow."""

    def close(self) -> None:
        """Nothing is open."""


class Together:
    """The processes of a launch, joined over gloo: what travels are questions and answers."""

    def __init__(self) -> None:
        dist.init_process_group("gloo", timeout=_PATIENCE)
        self.size = dist.get_world_size()
        self.leads = dist.get_rank() == 0

    def results(
        self, rounds: Iterable[Sequence[Work]], work: Callable[[Work], Result]
    ) -> Iterator[tuple[Work, Result]]:
        """See `Crew.results`. Whatever ends the loop sends the others home."""
        try:
            for batches in rounds:
                mine = self._hand_out(batches) or []
                done = self._collect(_done(mine, work))
                # processes beyond the last batch had nothing to do
                for batch, result in zip(batches, done, strict=False):
                    if isinstance(result, ChatBindError):
                        raise result
                    yield batch, result[0]
        finally:
            self._hand_out(None)

    def follow(self, work: Callable[[Work], Result]) -> None:
        """See `Crew.follow`."""
        share: list[Work] | None = self._hand_out(None)
        while share is not None:
            self._collect(_done(share, work))
            share = self._hand_out(None)

    def close(self) -> None:
        """Leaves the group."""
        dist.destroy_process_group()

    def _hand_out(self, batches: Sequence[Work] | None) -> list[Work] | None:
        """Gives each process its share; returns this one's: one batch or none, None at the end."""
        mine: list[list[Work] | None] = [None]
        shares: list[list[Work] | None] | None = None
        if self.leads:
            shares = [None] * self.size
            if batches is not None:
                given: list[list[Work]] = [[batch] for batch in batches]
                shares = [*given, *([] for _ in range(self.size - len(given)))]
        dist.scatter_object_list(mine, shares, src=0)
        return mine[0]

    def _collect(self, result: list[Result] | ChatBindError) -> list[list[Result] | ChatBindError]:
        """Everybody's results in the leader; nothing elsewhere."""
        if not self.leads:
            dist.gather_object(result, None, dst=0)
            return []
        gathered = [result] * self.size
        dist.gather_object(result, gathered, dst=0)
        return gathered


def _done(share: Sequence[Work], work: Callable[[Work], Result]) -> list[Result] | ChatBindError:
    """The results of a share; an error travels to the leader, which raises it."""
    try:
        return [work(batch) for batch in share]
    except ChatBindError as error:
        return error


def assemble_crew() -> Crew:
    """This process alone, or the processes that it was launched with."""
    return Together() if launch.world_size() > 1 else Alone()

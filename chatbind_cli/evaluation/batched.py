"""Reviews that may take a day, at half the price: what `review --batch` does before it judges.

All missing judgements are asked for in batches, and their replies fetched; then they are made as
always, each with the reply that is there as the first one. What cannot be read is asked once more
at once, at the full price.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from chatbind_cli.cost import SHARE_OF_BATCHES
from chatbind_cli.errors import ChatBindError, Interrupted
from chatbind_cli.evaluation.cases import Judgement
from chatbind_cli.evaluation.judgement_cache import JudgementCache
from chatbind_cli.evaluation.judges.chat import ChatJudge
from chatbind_cli.jsonl import Record


class BatchedReplies:
    """The first replies of a judge to judgements that are neither in a file nor in the cache.

    Args:
        judge: is told the replies.
        path: the reviews; what is ordered stands in a file beside it.
        cache: of the judgements that need none.

    Attributes:
        held: what ends the run once the judgements that have a reply are made.
    """

    def __init__(self, judge: ChatJudge, path: Path, cache: JudgementCache) -> None:
        self._judge, self._cache = judge, cache
        self._path = path.with_name(f"{path.name}.batches")
        self._batches = judge.model.batches(self._path)
        self._settled = judge.batched = {}
        # Several judgements may ask the same.
        self._missing: dict[str, list[Judgement]] = {}
        self.held: ChatBindError | None = None

    def fetch(
        self, judgements: Iterable[Judgement], done: Container[object], *, wait: bool
    ) -> list[Judgement]:
        """Orders what the output lacks and fetches what is over, or waits until all is.

        Args:
            judgements: all of a run.
            done: ids of the reviews that are in the output.
            wait: for what is not over yet.

        Returns:
            The judgements that do not have to wait for another run.

        Raises:
            ChatBindError: the endpoint refuses them, or cannot be asked.
        """
        judgements = list(judgements)
        for judgement in judgements:
            if judgement.review_id not in done and judgement.case.problem is None:
                kept = self._cache.key(self._judge, judgement)
                if kept is None or self._cache.find(kept, judgement) is None:
                    self._missing.setdefault(self._judge.cache_key(judgement), []).append(judgement)
        asyncio.run(self._fetch(wait))
        waiting = {judgement.review_id for same in self._missing.values() for judgement in same}
        return [judgement for judgement in judgements if judgement.review_id not in waiting]

    def forget(self) -> None:
        """Forgets the batches whose replies are on disk as reviews now."""
        self._batches.forget()

    async def _fetch(self, wait: bool) -> None:
        ordered: set[str] = set()
        try:
            while True:
                over = await self._batches.take(wait=wait)
                self._settle(ordered, over)
                if not over:
                    self.held = Interrupted(
                        "batches are not over yet",
                        where=str(self._path),
                        hint="the same command takes what is done by then",
                    )
                if self.held or not self._missing:
                    # what is asked at once now is not to cost what those under way may
                    self._judge.model.budget.spent_usd += self._batches.most_usd
                    return
                await self._batches.order(self._affordable(ordered))
        finally:
            await self._batches.hang_up()

    def _settle(self, ordered: set[str], over: bool) -> None:
        """Takes off the list what has a reply, or was over without one."""
        names: set[str] = set()
        for key, (judgement, *_) in list(self._missing.items()):
            reply = self._batches.pop(key)
            if reply is not None:
                sent = self._judge.first_request(judgement)
                names = names or set(sent)  # the first refusal changes those that come
                settled = self._judge.model.settle(reply, sent, names)
                if settled is None:
                    ordered.discard(key)
                    continue
                self._settled[key] = settled
            if reply is not None or (over and key in ordered):
                del self._missing[key]

    def _affordable(self, ordered: set[str]) -> Iterator[tuple[str, Record, float]]:
        """The missing requests as far as the limit on the cost has room for them."""
        budget = self._judge.model.budget
        committed = self._batches.most_usd
        for key, (judgement, *_) in self._missing.items():
            if key in ordered:
                continue
            sent = self._judge.first_request(judgement)
            _, tokens = self._judge.expected_tokens(judgement.case)
            most = SHARE_OF_BATCHES * budget.price.cost_usd(len(json.dumps(sent)), tokens)
            if not budget.fits(committed + most):
                self.held = budget.refusal(committed + most)
                return
            committed += most
            ordered.add(key)
            yield key, sent, most

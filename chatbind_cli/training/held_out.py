"""The loss on held-out conversations: the mean over their labelled tokens, however they are split.

The library's is a mean over samples of means over batches: with other batches, or other processes,
another number.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from chatbind_cli.data.tokens import IGNORE_INDEX
from chatbind_cli.stopping import leave_to_parent, unheard
from chatbind_cli.training.samples import Collator, TrainingSamples


def shares(samples: int, batch_size: int, rank: int, world: int) -> list[tuple[range, bool]]:
    """The batches of a process, as many as every other has.

    Returns:
        The numbers of each batch's samples, and whether it counts: sharded models want all
        processes to take part, also those for which nothing is left.
    """
    batches = [range(at, min(at + batch_size, samples)) for at in range(0, samples, batch_size)]
    passes = -(-len(batches) // world)
    mine = range(rank, passes * world, world)
    return [(batches[i % len(batches)], i < len(batches)) for i in mine]


def held_out_batches(
    samples: TrainingSamples, collate: Collator, batches: list[range], workers: int
) -> Iterator[dict[str, Any]]:
    """Batches of these samples, made by so many processes, which leave signals to this one."""
    loader = DataLoader(
        samples,
        batch_sampler=[list(numbers) for numbers in batches],
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=leave_to_parent,
        # the process's own random state is left alone
        generator=torch.Generator().manual_seed(0),
    )
    with unheard(signal.SIGTERM):
        return iter(loader)


@torch.no_grad()
def held_out_loss(
    batches: Iterable[dict[str, Any]],
    counts: list[bool],
    loss_of: Callable[[dict[str, Any]], torch.Tensor],
    total: Callable[[torch.Tensor], torch.Tensor],
) -> float:
    """The mean loss of all labelled tokens.

    Args:
        batches: of this process.
        counts: whether each of them counts, see `shares`.
        loss_of: the mean over a batch's labelled tokens, on the device.
        total: adds a tensor up over all processes.
    """
    sums = []
    for batch, real in zip(batches, counts, strict=True):
        labelled = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) * real
        loss = loss_of(batch).float()
        # a batch in which nothing is labelled has no mean
        sums.append(
            torch.stack(
                [loss.new_zeros(()) if not labelled else loss * labelled, loss.new_tensor(labelled)]
            )
        )
    summed, tokens = total(torch.stack(sums).sum(dim=0)).tolist()
    return float(summed / max(tokens, 1))

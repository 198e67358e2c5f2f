"""The loss on held-out conversations: the mean over their labelled tokens, however they are split.

The library's is a mean over samples of means over batches: with other batches, or other processes,
another number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from chatbind_cli.data.tokens import IGNORE_INDEX
from chatbind_cli.stopping import leave_to_parent
from chatbind_cli.training.samples import Collator, TrainingSamples


def shares(samples: int, batch_size: int, rank: int, world: int) -> list[tuple[range, bool]]:
    """The batches of a process, as many as every other has.

    Returns:
        The numbers of each batch's samples, and whether it counts: sharded models want all
        processes to take part, also those for which nothing is left.
    """
    batches = [
        range(at, min(at + batch_size, samples)) for at in range(0, samples, batch_size)
    ]
    passes = -(-len(batches) // world)
    mine = range(rank, passes * world, world)
    return [(batches[i % len(batches)], i < len(batches)) for i in mine]


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    loader: DataLoader[Any],
    counts: list[bool],
    prepare: Callable[[dict[str, Any]], dict[str, Any]],
    total: Callable[[torch.Tensor], torch.Tensor],
) -> float:
    """The mean loss of all labelled tokens.

    Args:
        model: put into evaluation mode, and left in it.
        loader: of this process's batches.
        counts: whether each of them counts, see `shares`.
        prepare: takes away what is not for the model, and brings the rest to its device.
        total: adds a tensor up over all processes.
    """
    model.eval()
    sums = []
    for batch, real in zip(loader, counts, strict=True):
        labelled = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
        inputs = prepare(batch)
        loss = model(**inputs).loss.float()
        tokens = labelled.to(loss.device) * real
        # a batch in which nothing is labelled has no mean
        sums.append(torch.stack([torch.where(tokens > 0, loss * tokens, 0), tokens]))
    summed, tokens = total(torch.stack(sums).sum(dim=0)).tolist()
    return float(summed / max(tokens, 1))


def held_out_loader(
    samples: TrainingSamples, collate: Collator, batches: list[range], workers: int
) -> DataLoader[Any]:
    """Batches of these samples, made by so many processes."""
    return DataLoader(
        samples,
        batch_sampler=[list(numbers) for numbers in batches],
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=leave_to_parent,
        # the process's own random state is left alone
        generator=torch.Generator().manual_seed(0),
    )

"""The loss on held-out conversations: the mean over their labelled tokens, however they are split.

The library's is a mean over samples of means over batches: with other batches, or other processes,
another number.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from chatbind_cli.stopping import unheard
from chatbind_cli.training.batches import Step, StepSamples, step_loader, tensors


def held_out_batches(samples: StepSamples, workers: int) -> Iterator[dict[str, Any]]:
    """The batches of one process, as many as every other has, made by so many worker processes."""
    count, each = len(samples), samples.share.samples * samples.share.processes
    order = [Step(0, [*range(at, min(at + each, count))]) for at in range(0, count, each)]
    with unheard(signal.SIGTERM):  # workers leave it to this process
        steps = iter(step_loader(samples, order, workers, 0))
    for step in steps:
        yield from tensors(step["passes"], pin=False)


@torch.no_grad()
def held_out_loss(
    batches: Iterable[dict[str, Any]],
    loss_of: Callable[[dict[str, Any]], torch.Tensor],
    total: Callable[[torch.Tensor], torch.Tensor],
) -> float:
    """The mean loss of all labelled tokens.

    Args:
        batches: of this process, with their `work`.
        loss_of: the mean over a batch's labelled tokens, on the device.
        total: adds a tensor up over all processes.
    """
    sums = []
    for batch in batches:
        labelled = batch["work"].labelled
        loss = loss_of(batch).float()
        # a batch in which nothing is labelled has no mean
        both = [loss * labelled if labelled else loss.new_zeros(()), loss.new_tensor(labelled)]
        sums.append(torch.stack(both))
    summed, tokens = total(torch.stack(sums).sum(dim=0)).tolist()
    return float(summed / max(tokens, 1))

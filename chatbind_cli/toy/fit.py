"""The one training loop of the toy world, and the settings of torch that make it repeatable.

Knows nothing of what is trained: a model's own file says what the loss of a step is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

# Sums are split among threads, so their rounding depends on how many there are: always two, even
# where there are fewer or more cores.
THREADS = 1

Report = Callable[[int, float], None]
"""Told the step, from 1, and the mean loss since the last report."""

_REPORT_EVERY_STEPS = 50


@contextmanager
def fixed_threads() -> Iterator[None]:
    """Has torch work on `THREADS` threads; what it was before is restored."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def repeatable(seed: int) -> Iterator[torch.Generator]:
    """Fixes the number of threads and what fresh weights are drawn from; both are restored.

    Yields:
        A generator for everything else that is random.
    """
    with fixed_threads(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


def fit(
    parameters: Iterable[nn.Parameter],
    loss_of_step: Callable[[], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    report: Report,
) -> None:
    """Minimises with AdamW: a warm-up over a tenth of the steps, then down along a cosine.

    Args:
        parameters: what is trained.
        loss_of_step: draws a batch and returns its loss.
        steps: how many.
        learning_rate: the highest.
        weight_decay: of all parameters.
        report: called now and then, and after the last step.
    """
    trained = list(parameters)
    optimizer = torch.optim.AdamW(
        trained, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=max(steps, 2), pct_start=0.1
    )
    losses: list[float] = []
    for step in range(1, steps + 1):
        loss = loss_of_step()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % _REPORT_EVERY_STEPS == 0 or step == steps:
            report(step, sum(losses) / len(losses))
            losses.clear()

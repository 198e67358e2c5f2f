"""How large a toy world is, how long its models train, and the one loop that trains them.

A model's own file says what the loss of a step is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from chatbind_cli.device import one_thread

VERSION = 2
"""Raise this when the same seed gives another world."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """The extent of a world.

    Attributes:
        train_items: training items by modality; the first ones of the handwriting.
        heldout_items: held-out items of every modality; no training ever sees them.
        image_epochs: passes over the images for the image tower.
        bind_epochs: passes by modality for the towers that are bound to it.
        language_steps: batches of text for the language model.
    """

    train_items: Mapping[str, int]
    heldout_items: int
    image_epochs: int
    bind_epochs: Mapping[str, int]
    language_steps: int


FULL = Size(
    train_items={
        "image": 1597,
        "video": 120,
        "audio": 300,
        "depth": 1000,
        "thermal": 1000,
        "imu": 400,
    },
    heldout_items=100,
    image_epochs=20,
    bind_epochs={"audio": 12, "depth": 14, "thermal": 14, "imu": 22},
    language_steps=260,
)

QUICK = Size(
    train_items={"image": 64, "video": 8, "audio": 32, "depth": 32, "thermal": 32, "imu": 32},
    heldout_items=10,
    image_epochs=2,
    bind_epochs={"audio": 2, "depth": 2, "thermal": 2, "imu": 2},
    language_steps=4,
)
"""Everything in its place and nothing learned: for tests of the commands."""

Report = Callable[[int, float], None]
"""Told the step, from 1, and the mean loss since the last report."""

_REPORT_EVERY_STEPS = 50


@contextmanager
def repeatable(seed: int) -> Iterator[torch.Generator]:
    """Has one thread, and fixes what fresh weights are drawn from; both are restored.

    Sums are split among threads, so that their rounding depends on how many there are.

    Yields:
        A generator for everything else that is random.
    """
    with one_thread(), torch.random.fork_rng(devices=[]):
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

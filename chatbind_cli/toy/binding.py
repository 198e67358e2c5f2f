"""Trains a toy encoder: the image tower on named digits, the others by binding them to it.

The image tower learns as CLIP's does, from pictures and their names, except that ten learned
vectors take the place of a text tower. It is frozen then, and every other modality learns to put
a digit where its pictures are.

A kind of encoder says what its towers are: see `ToyEncoder`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from chatbind_cli.toy.digits import NAMES
from chatbind_cli.toy.fit import Report, fit

# Depth and thermal pictures show the very scan of their image; a sound or a movement has no more
# in common with an image than the digit.
_SAME_SCAN = frozenset({"depth", "thermal"})

_NAME_SCALE = 12.0  # inverse temperature of image against names
_PAIR_SCALE = 10.0  # of a modality against images
_ALIGN_WEIGHT = 4.0  # of the cosine term, which closes the gap that InfoNCE leaves open


@dataclass(frozen=True)
class Samples:
    """What was recorded in one modality.

    Attributes:
        tensors: [n, ...] as a `Tower` reads them; films, and sounds of ImageBind, have an axis of
            clips after the first: [n, clips, ...].
        digits: [n], 0 to 9.
    """

    tensors: torch.Tensor
    digits: torch.Tensor

    def __len__(self) -> int:
        return len(self.digits)


class Tower(nn.Module, ABC):
    """One tower in training: batches in, embeddings of norm 1 out.

    Attributes:
        dim: length of an embedding.
        learning_rate: the highest.
    """

    dim: int
    learning_rate: float

    @abstractmethod
    def as_clips(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures [b, c, h, w] as clips of a film that stands still."""

    @abstractmethod
    def varied(self, batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The same digits, recorded a little differently; the image tower takes clips, too."""

    def parameters_to_train(self) -> list[nn.Parameter]:
        """What is to be fitted."""
        return list(self.parameters())

    @abstractmethod
    def finish(self) -> None:
        """Puts what was learned where the encoder keeps it."""


class ToyEncoder(ABC):
    """An encoder of some kind that is to be trained; its modules are drawn from torch's generator.

    Attributes:
        bound: its modalities with a tower of their own, which is to be bound to the image tower.
        epochs_factor: how many times as many epochs it takes as a `Size` says.
    """

    bound: ClassVar[tuple[str, ...]]
    epochs_factor: ClassVar[int] = 1

    @abstractmethod
    def tower(self, modality: str) -> Tower:
        """The tower for a modality, with what training starts from."""

    @abstractmethod
    def prepare(self, tensor: torch.Tensor, modality: str) -> torch.Tensor:
        """A medium as the encoder reads it, as the tower learns from it; see `Samples`."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the encoder as it is now."""


def train_image_tower(
    tower: Tower,
    images: Samples,
    films: Samples,
    *,
    epochs: int,
    generator: torch.Generator,
    report: Report,
) -> None:
    """Fits the image tower to the digits' names; every fourth sample is a clip of a film.

    Source: CLIP (Radford et al., 2021), with a table of names for the text tower.
    """
    names = nn.Parameter(torch.randn(len(NAMES), tower.dim))
    size = 64
    of_films = size // 4
    batches = _batches(len(images), size - of_films, generator)

    def loss() -> torch.Tensor:
        chosen = next(batches)
        film = torch.randint(len(films), (of_films,), generator=generator)
        clip = torch.randint(films.tensors.shape[1], (of_films,), generator=generator)
        pictures = tower.as_clips(tower.varied(images.tensors[chosen], generator))
        clips = tower.varied(films.tensors[film, clip], generator)
        embeddings = tower(torch.cat([pictures, clips]))
        digits = torch.cat([images.digits[chosen], films.digits[film]])
        return F.cross_entropy(_NAME_SCALE * embeddings @ F.normalize(names, dim=-1).T, digits)

    _fit(tower, [names], loss, _steps(len(images), size - of_films, epochs), report)


def bind(
    tower: Tower,
    modality: str,
    samples: Samples,
    images: Samples,
    *,
    epochs: int,
    generator: torch.Generator,
    report: Report,
) -> None:
    """Binds a modality to the frozen image tower by pairs that show the same digit.

    InfoNCE in both directions, where all pairs of a batch that share a digit count as right, plus
    the cosine distance to the paired image: InfoNCE alone ranks well and leaves the modalities in
    different corners of the space, where a projector that saw only images does not know them.

    `images` holds in place of pictures their embeddings of norm 1, [n, d]; row i shows the scan
    of sample i.

    Source: ImageBind (Girdhar et al., 2023), section 3.2; supervised contrastive learning (Khosla
        et al., 2020) for the several right pairs; "Mind the gap" (Liang et al., 2022).
    """
    with_digit = [torch.nonzero(images.digits == digit)[:, 0] for digit in range(len(NAMES))]
    size = 32
    batches = _batches(len(samples), size, generator)

    def loss() -> torch.Tensor:
        chosen = next(batches)
        digits = samples.digits[chosen]
        partners = chosen
        if modality not in _SAME_SCAN:
            same = [with_digit[digit] for digit in digits.tolist()]
            partners = torch.stack(
                [rows[torch.randint(len(rows), (), generator=generator)] for rows in same]
            )
        embeddings = tower(tower.varied(samples.tensors[chosen], generator))
        return _pair_loss(embeddings, images.tensors[partners], digits)

    _fit(tower, [], loss, _steps(len(samples), size, epochs), report)


def _fit(
    tower: Tower,
    beside: list[nn.Parameter],
    loss: Callable[[], torch.Tensor],
    steps: int,
    report: Report,
) -> None:
    """Fits a tower, and what is learned beside it, and puts it where the encoder has it."""
    fit(
        [*tower.parameters_to_train(), *beside],
        loss,
        steps=steps,
        learning_rate=tower.learning_rate,
        weight_decay=0.05,
        report=report,
    )
    tower.finish()
    tower.eval()


def _pair_loss(
    embeddings: torch.Tensor, images: torch.Tensor, digits: torch.Tensor
) -> torch.Tensor:
    """InfoNCE over a batch of pairs [b, d], with equal shares for pairs of the same digit."""
    right = (digits[:, None] == digits).float()
    right /= right.sum(dim=1, keepdim=True)
    logits = _PAIR_SCALE * embeddings @ images.T
    contrast = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    return contrast + _ALIGN_WEIGHT * (1 - (embeddings * images).sum(dim=1)).mean()


def wobble(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures [b, c, h, w] turned, slanted, moved and scaled by up to a tenth or two."""
    count = len(pictures)
    scale = uniform(0.85, 1.25, (count,), generator)
    angle, slant, right, down = uniform(-0.2, 0.2, (4, count), generator)
    rows = [
        torch.stack([scale * angle.cos(), slant - scale * angle.sin(), right], dim=1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), down], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Indices in an ever new order; what is left over at the end of a pass is not used."""
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)


def _steps(count: int, size: int, epochs: int) -> int:
    return epochs * max(count // size, 1)


def uniform(
    low: float, high: float, shape: tuple[int, ...], generator: torch.Generator
) -> torch.Tensor:
    """Numbers from `low` to `high`."""
    return torch.empty(shape).uniform_(low, high, generator=generator)


@torch.inference_mode()
def embed(tower: Tower, tensors: torch.Tensor) -> torch.Tensor:
    """Embeddings of norm 1, [n, d], of pictures [n, c, h, w]."""
    rows = torch.cat([tower(part) for part in tensors.split(64)])
    return F.normalize(rows, dim=-1)  # once more: of norm 1 to the last bit

"""Trains the toy ImageBind: the image tower on named digits, the others by binding them to it.

The image tower learns as CLIP's does, from pictures and their names, except that ten learned
vectors take the place of a text tower. It is frozen then, and every other modality learns to put
a digit where its pictures are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from chatbind_cli.encoders.imagebind.config import ImageBindConfig
from chatbind_cli.encoders.imagebind.model import ImageBind
from chatbind_cli.toy.cells import COARSE, Tower
from chatbind_cli.toy.digits import NAMES
from chatbind_cli.toy.fit import Report, fit

BOUND = ("audio", "depth", "thermal", "imu")
"""Modalities with a tower of their own, which has to be bound to the image tower."""

# Depth and thermal pictures show the very scan of their image; a sound or a movement has no more
# in common with an image than the digit.
_SAME_SCAN = frozenset({"depth", "thermal"})

CONFIG = ImageBindConfig(
    out_embed_dim=64,
    kernel_size=(2, 56, 56),
    vision_embed_dim=64,
    vision_num_blocks=2,
    vision_num_heads=4,
    audio_kernel_size=32,
    audio_stride=32,
    audio_embed_dim=64,
    audio_num_blocks=2,
    audio_num_heads=4,
    audio_drop_path=0.0,
    depth_kernel_size=56,
    depth_embed_dim=64,
    depth_num_blocks=2,
    depth_num_heads=4,
    thermal_kernel_size=56,
    thermal_embed_dim=64,
    thermal_num_blocks=2,
    thermal_num_heads=4,
    imu_kernel_size=100,
    imu_embed_dim=64,
    imu_num_blocks=2,
    imu_num_heads=4,
    imu_drop_path=0.0,
    imu_head_dropout=0.0,
)
"""Large patches, narrow and shallow towers: an image costs a few million multiplications."""

_NAME_SCALE = 12.0  # inverse temperature of image against names
_PAIR_SCALE = 10.0  # of a modality against images
_ALIGN_WEIGHT = 4.0  # of the cosine term, which closes the gap that InfoNCE leaves open


@dataclass(frozen=True)
class Samples:
    """What was recorded in one modality.

    Attributes:
        tensors: [n, ...] as `cells.Tower` reads them; film and sound have an axis of clips after
            the first: [n, clips, ...].
        digits: [n], 0 to 9.
    """

    tensors: torch.Tensor
    digits: torch.Tensor

    def __len__(self) -> int:
        return len(self.digits)


def new_model(modalities: Iterable[str]) -> ImageBind:
    """A fresh toy ImageBind with the towers of some modalities; draws from torch's generator."""
    return ImageBind(CONFIG, modalities, drop_path=True)


def train_image_tower(
    model: ImageBind,
    images: Samples,
    films: Samples,
    *,
    epochs: int,
    generator: torch.Generator,
    report: Report,
) -> Tower:
    """Fits the image tower to the digits' names; every fourth sample is a clip of a film.

    Source: CLIP (Radford et al., 2021), with a table of names for the text tower.
    """
    tower = Tower(model, "image")
    names = nn.Parameter(torch.randn(len(NAMES), CONFIG.out_embed_dim))
    size = 64
    of_films = size // 4
    batches = _batches(len(images), size - of_films, generator)

    def loss() -> torch.Tensor:
        chosen = next(batches)
        clips, film_digits = _random_clips(films, of_films, generator)
        pictures = _wobble(images.tensors[chosen], generator).unsqueeze(2).expand(-1, -1, 2, -1, -1)
        embeddings = tower(torch.cat([pictures, clips]))
        digits = torch.cat([images.digits[chosen], film_digits])
        return F.cross_entropy(_NAME_SCALE * embeddings @ F.normalize(names, dim=-1).T, digits)

    fit(
        [*tower.parameters_to_train(), names],
        loss,
        steps=_steps(len(images), size - of_films, epochs),
        learning_rate=4e-3,
        weight_decay=0.05,
        report=report,
    )
    tower.spread()
    return tower.eval()


def bind(
    model: ImageBind,
    modality: str,
    samples: Samples,
    images: torch.Tensor,
    image_digits: torch.Tensor,
    *,
    epochs: int,
    generator: torch.Generator,
    report: Report,
) -> Tower:
    """Binds a modality to the frozen image tower by pairs that show the same digit.

    InfoNCE in both directions, where all pairs of a batch that share a digit count as right, plus
    the cosine distance to the paired image: InfoNCE alone ranks well and leaves the modalities in
    different corners of the space, where a projector that saw only images does not know them.

    Args:
        model: has the modality's tower.
        modality: one of `BOUND`.
        samples: of the modality.
        images: embeddings of norm 1, [n, d]; row i shows the scan of sample i.
        image_digits: [n].
        epochs: passes over the samples.
        generator: what random choices come from.
        report: see `fit`.

    Source: ImageBind (Girdhar et al., 2023), section 3.2; supervised contrastive learning (Khosla
        et al., 2020) for the several right pairs; "Mind the gap" (Liang et al., 2022).
    """
    tower = Tower(model, modality)
    with_digit = [torch.nonzero(image_digits == digit)[:, 0] for digit in range(len(NAMES))]
    size = 32
    batches = _batches(len(samples), size, generator)

    def loss() -> torch.Tensor:
        chosen = next(batches)
        digits = samples.digits[chosen]
        partners = chosen
        if modality not in _SAME_SCAN:
            partners = torch.stack([_pick(with_digit[d], generator) for d in digits.tolist()])
        embeddings = tower(_varied(samples.tensors[chosen], modality, generator))
        return _pair_loss(embeddings, images[partners], digits)

    fit(
        tower.parameters_to_train(),
        loss,
        steps=_steps(len(samples), size, epochs),
        learning_rate=3e-3,
        weight_decay=0.05,
        report=report,
    )
    tower.spread()
    return tower.eval()


def _pair_loss(
    embeddings: torch.Tensor, images: torch.Tensor, digits: torch.Tensor
) -> torch.Tensor:
    """InfoNCE over a batch of pairs [b, d], with equal shares for pairs of the same digit."""
    right = (digits[:, None] == digits).float()
    right /= right.sum(dim=1, keepdim=True)
    logits = _PAIR_SCALE * embeddings @ images.T
    contrast = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    return contrast + _ALIGN_WEIGHT * (1 - (embeddings * images).sum(dim=1)).mean()


def _varied(batch: torch.Tensor, modality: str, generator: torch.Generator) -> torch.Tensor:
    """The same digits, recorded a little differently."""
    if modality in COARSE:
        return _wobble(batch, generator)
    if modality == "audio":
        return batch[torch.arange(len(batch)), _whole(batch.shape[1], (len(batch),), generator)]
    shift = int(_whole(121, (1,), generator)) - 60  # up to 0.15 s
    return batch.roll(shift, dims=-1) * _uniform(0.8, 1.2, (len(batch), 1, 1), generator)


def _wobble(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures [b, c, h, w] turned, slanted, moved and scaled by up to a tenth or two."""
    count = len(pictures)
    scale = _uniform(0.85, 1.25, (count,), generator)
    angle, slant, right, down = _uniform(-0.2, 0.2, (4, count), generator)
    rows = [
        torch.stack([scale * angle.cos(), slant - scale * angle.sin(), right], dim=1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), down], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def _random_clips(
    films: Samples, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    which = _whole(len(films), (count,), generator)
    clip = _whole(films.tensors.shape[1], (count,), generator)
    return films.tensors[which, clip], films.digits[which]


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Indices in an ever new order; what is left over at the end of a pass is not used."""
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)


def _steps(count: int, size: int, epochs: int) -> int:
    return epochs * max(count // size, 1)


def _pick(options: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return options[_whole(len(options), (), generator)]


def _whole(below: int, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(below, shape, generator=generator)


def _uniform(
    low: float, high: float, shape: tuple[int, ...], generator: torch.Generator
) -> torch.Tensor:
    return torch.empty(shape).uniform_(low, high, generator=generator)


@torch.inference_mode()
def embed(tower: Tower, tensors: torch.Tensor) -> torch.Tensor:
    """Embeddings of norm 1, [n, d]; those of several clips are averaged.

    Args:
        tower: trained.
        tensors: as `Samples` holds them.
    """
    single = 4 if tower.tower != "imu" else 3
    rows = []
    for part in tensors.split(64):
        clips = part.flatten(0, 1) if part.ndim > single else part
        rows.append(tower(clips).unflatten(0, (len(part), -1)).mean(dim=1))
    return F.normalize(torch.cat(rows), dim=-1)


def class_means(embeddings: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
    """Where each digit lies on average, [10, d], of norm 1."""
    means = [embeddings[digits == digit].mean(dim=0) for digit in range(len(NAMES))]
    return F.normalize(torch.stack(means), dim=-1)


def nearest_mean_accuracy(
    embeddings: torch.Tensor, digits: torch.Tensor, means: torch.Tensor
) -> float:
    """The share of embeddings [n, d] that lie nearest to the mean [10, d] of their own digit."""
    return float(((embeddings @ means.T).argmax(dim=1) == digits).float().mean())

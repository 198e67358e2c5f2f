"""Trains the toy ImageBind: the image tower on named digits, the others by binding them to it.

The image tower learns as CLIP's does, from pictures and their names, except that ten learned
vectors take the place of a text tower. It is frozen then, and every other modality learns to put
a digit where its pictures are.

The toy world's pictures are smooth: the means of cells of 7x7 pixels say all there is to say, and
cost a fiftieth. So a tower learns stem weights for cells, and these are then spread evenly over
their pixels, which is the same function of the full picture. Trunk and head are the tower's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from chatbind_cli.encoders.imagebind.config import IMU_CHANNELS, TOWER_OF, ImageBindConfig
from chatbind_cli.encoders.imagebind.model import ImageBind
from chatbind_cli.toy.digits import NAMES
from chatbind_cli.toy.fit import Report, fit

BOUND = ("audio", "depth", "thermal", "imu")
"""Modalities with a tower of their own, which has to be bound to the image tower."""

# Depth and thermal pictures show the very scan of their image; a sound or a movement has no more
# in common with an image than the digit.
_SAME_SCAN = frozenset({"depth", "thermal"})

_EACH_TOWER: dict[str, Any] = {"embed_dim": 64, "num_blocks": 2, "num_heads": 4}

CONFIG = ImageBindConfig(
    out_embed_dim=64,
    kernel_size=(2, 56, 56),
    audio_kernel_size=32,
    audio_stride=32,
    audio_drop_path=0.0,
    depth_kernel_size=56,
    thermal_kernel_size=56,
    imu_kernel_size=100,
    imu_drop_path=0.0,
    imu_head_dropout=0.0,
    **{f"{tower}_{k}": v for tower in ("vision", *BOUND) for k, v in _EACH_TOWER.items()},
)
"""Large patches, narrow and shallow towers: an image costs a few million multiplications."""

CELL = 7
"""Pixels on a side; 224 and the toy encoder's patches are multiples of it."""

COARSE = frozenset({"image", "video", "depth", "thermal"})
"""Modalities whose tensors are pictures."""

# As large as the tokens themselves. With the usual 0.02 a tower sees a bag of patches at first,
# and takes more than twice as many steps to come to the same accuracy.
_POSITION_STD = 1.0

_NAME_SCALE = 12.0  # inverse temperature of image against names
_PAIR_SCALE = 10.0  # of a modality against images
_ALIGN_WEIGHT = 4.0  # of the cosine term, which closes the gap that InfoNCE leaves open


@dataclass(frozen=True)
class Samples:
    """What was recorded in one modality.

    Attributes:
        tensors: [n, ...] as `Tower` reads them; film and sound have an axis of clips after
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


def to_cells(pixels: torch.Tensor) -> torch.Tensor:
    """Means over cells: [..., 224, 224] -> [..., 32, 32]."""
    flat = pixels.reshape(-1, 1, *pixels.shape[-2:])
    return F.avg_pool2d(flat, CELL).reshape(
        *pixels.shape[:-2], *(s // CELL for s in flat.shape[2:])
    )


class Tower(nn.Module):
    """One tower in training: batches in, embeddings of norm 1 out.

    Pictures come as cells, sounds and motion as the encoder's own tensors.
    """

    def __init__(self, model: ImageBind, modality: str) -> None:
        super().__init__()
        self.tower = TOWER_OF[modality]
        self.stem = model.modality_preprocessors[self.tower]
        self.trunk = model.modality_trunks[self.tower]
        self.head = model.modality_heads[self.tower]
        weight = patch_weight(self.stem, self.tower)
        self.cells: nn.Parameter | None = None
        if modality in COARSE:
            side = weight.shape[-1] // CELL
            weight = self.cells = nn.Parameter(weight.new_empty(*weight.shape[:-2], side, side))
            nn.init.xavier_uniform_(weight.view(len(weight), -1))
        _without_level(weight)
        nn.init.normal_(_positions(self.stem, self.tower), std=_POSITION_STD)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Embeddings [b, d] of norm 1.

        Args:
            batch: image [b, 3, 32, 32]; video [b, 3, 2, 32, 32]; depth and thermal
                [b, 1, 32, 32]; audio [b, 1, 128, 204]; imu [b, 6, 2000].
        """
        tokens = self.stem(batch) if self.cells is None else self._tokens(batch, self.cells)
        return F.normalize(self.head(self.trunk(tokens)), dim=-1)

    def parameters_to_train(self) -> list[nn.Parameter]:
        """All but the weights of pixels where those of cells stand in for them."""
        skip = None if self.cells is None else patch_weight(self.stem, self.tower)
        return [parameter for parameter in self.parameters() if parameter is not skip]

    @torch.no_grad()
    def spread(self) -> None:
        """Writes the weights of cells into the tower, an equal share to each of their pixels."""
        if self.cells is not None:
            pixels = repeat(self.cells / CELL**2, "... h w -> ... (h r) (w k)", r=CELL, k=CELL)
            patch_weight(self.stem, self.tower).copy_(pixels)

    def _tokens(self, batch: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What the stem does, on cells."""
        side = weight.shape[-1]
        if self.tower == "vision":
            clips = batch if batch.ndim == 5 else repeat(batch, "b c h w -> b c f h w", f=2)
            patches = rearrange(clips, "b c f (h r) (w k) -> b (h w) (c f r k)", r=side, k=side)
            tokens = F.linear(patches, weight.flatten(1))
        else:
            patches = rearrange(batch, "b c (h r) (w k) -> b (h w) (c r k)", r=side, k=side)
            norm = self.stem.get_submodule(f"{self.stem.stem_name}.norm_layer")
            tokens = norm(F.linear(patches, weight.flatten(1)))
        first = self.stem.get_parameter("cls_token").expand(len(tokens), -1, -1)
        return torch.cat([first, tokens], dim=1) + _positions(self.stem, self.tower)


def patch_weight(stem: nn.Module, tower: str) -> nn.Parameter:
    """The weight that makes tokens of a tower's input."""
    if tower == "vision":
        return stem.get_submodule("rgbt_stem.proj.1").get_parameter("weight")
    if tower == "imu":
        return stem.get_parameter("imu_stem.proj.weight")
    return stem.get_submodule(str(stem.stem_name)).get_parameter("proj.weight")


def _positions(stem: nn.Module, tower: str) -> nn.Parameter:
    """The table that tells tokens where they are."""
    name = "pos_embed" if tower == "imu" else "pos_embedding_helper.pos_embed"
    module, _, parameter = name.rpartition(".")
    return stem.get_submodule(module).get_parameter(parameter)


@torch.no_grad()
def _without_level(weight: nn.Parameter) -> None:
    """Starts a stem blind to the level of its input, channel by channel.

    White paper, the distance of a wall and gravity are far larger than what is written on top of
    them, and would be all that a freshly drawn weight passes on.
    """
    channels = weight.flatten(-2) if weight.ndim > 2 else weight.unflatten(1, (IMU_CHANNELS, -1))
    level = channels.mean(dim=-1, keepdim=True).expand_as(channels)
    weight.sub_(level.reshape(weight.shape))


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
        film = _whole(len(films), (of_films,), generator)
        clip = _whole(films.tensors.shape[1], (of_films,), generator)
        pictures = _wobble(images.tensors[chosen], generator).unsqueeze(2).expand(-1, -1, 2, -1, -1)
        embeddings = tower(torch.cat([pictures, films.tensors[film, clip]]))
        digits = torch.cat([images.digits[chosen], films.digits[film]])
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
    images: Samples,
    *,
    epochs: int,
    generator: torch.Generator,
    report: Report,
) -> Tower:
    """Binds a modality to the frozen image tower by pairs that show the same digit.

    InfoNCE in both directions, where all pairs of a batch that share a digit count as right, plus
    the cosine distance to the paired image: InfoNCE alone ranks well and leaves the modalities in
    different corners of the space, where a projector that saw only images does not know them.

    `images` holds in place of pictures their embeddings of norm 1, [n, d]; row i shows the scan
    of sample i.

    Source: ImageBind (Girdhar et al., 2023), section 3.2; supervised contrastive learning (Khosla
        et al., 2020) for the several right pairs; "Mind the gap" (Liang et al., 2022).
    """
    tower = Tower(model, modality)
    with_digit = [torch.nonzero(images.digits == digit)[:, 0] for digit in range(len(NAMES))]
    size = 32
    batches = _batches(len(samples), size, generator)

    def loss() -> torch.Tensor:
        chosen = next(batches)
        digits = samples.digits[chosen]
        partners = chosen
        if modality not in _SAME_SCAN:
            same = [with_digit[digit] for digit in digits.tolist()]
            partners = torch.stack([rows[_whole(len(rows), (), generator)] for rows in same])
        embeddings = tower(_varied(samples.tensors[chosen], modality, generator))
        return _pair_loss(embeddings, images.tensors[partners], digits)

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


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Indices in an ever new order; what is left over at the end of a pass is not used."""
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)


def _steps(count: int, size: int, epochs: int) -> int:
    return epochs * max(count // size, 1)


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

"""The toy ImageBind in training.

The toy world's pictures are smooth: the means of cells of 7x7 pixels say all there is to say, and
cost a fiftieth. So a tower learns stem weights for cells, and these are then spread evenly over
their pixels, which is the same function of the full picture. Trunk and head are the tower's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from chatbind_cli.encoders.imagebind.config import IMU_CHANNELS, TOWER_OF, ImageBindConfig
from chatbind_cli.encoders.imagebind.model import ImageBind
from chatbind_cli.encoders.imagebind.weights import save_encoder
from chatbind_cli.toy.binding import Tower, ToyEncoder, uniform, wobble

BOUND = ("audio", "depth", "thermal", "imu")
"""Modalities with a tower of their own, which has to be bound to the image tower."""

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


def to_cells(pixels: torch.Tensor) -> torch.Tensor:
    """Means over cells: [..., 224, 224] -> [..., 32, 32]."""
    return F.avg_pool2d(pixels.flatten(0, -3), CELL).unflatten(0, pixels.shape[:-2])


class ImageBindTower(Tower):
    """A tower of the toy ImageBind.

    Pictures come as cells, sounds and motion as the encoder's own tensors.
    """

    dim = CONFIG.out_embed_dim

    def __init__(self, model: ImageBind, modality: str) -> None:
        super().__init__()
        self.modality = modality
        self.tower = TOWER_OF[modality]
        self.learning_rate = 4e-3 if modality == "image" else 3e-3
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
        nn.init.normal_(self._positions, std=_POSITION_STD)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Embeddings [b, d] of norm 1.

        Args:
            batch: image [b, 3, 32, 32]; video [b, 3, 2, 32, 32]; depth and thermal
                [b, 1, 32, 32]; audio [b, 1, 128, 204]; imu [b, 6, 2000].
        """
        tokens = self.stem(batch) if self.cells is None else self._tokens(batch, self.cells)
        return F.normalize(self.head(self.trunk(tokens)), dim=-1)

    def as_clips(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures [b, c, h, w] as clips of two frames, [b, c, 2, h, w]."""
        return pictures.unsqueeze(2).expand(-1, -1, 2, -1, -1)

    def varied(self, batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The same digits, recorded a little differently; of sounds one of the clips.

        Films stay as they are: the digits in them wander by themselves.
        """
        if self.modality in COARSE:
            return wobble(batch, generator) if batch.ndim == 4 else batch
        if self.modality == "audio":
            clip = torch.randint(batch.shape[1], (len(batch),), generator=generator)
            return batch[torch.arange(len(batch)), clip]
        shift = int(torch.randint(-60, 61, (1,), generator=generator))  # up to 0.15 s
        return batch.roll(shift, dims=-1) * uniform(0.8, 1.2, (len(batch), 1, 1), generator)

    def parameters_to_train(self) -> list[nn.Parameter]:
        """All but the weights of pixels where those of cells stand in for them."""
        skip = None if self.cells is None else patch_weight(self.stem, self.tower)
        return [parameter for parameter in self.parameters() if parameter is not skip]

    @torch.no_grad()
    def finish(self) -> None:
        """Writes the weights of cells into the tower, an equal share to each of their pixels."""
        if self.cells is not None:
            pixels = repeat(self.cells / CELL**2, "... h w -> ... (h r) (w k)", r=CELL, k=CELL)
            patch_weight(self.stem, self.tower).copy_(pixels)

    def _tokens(self, batch: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What the stem does, on cells."""
        side = weight.shape[-1]
        if self.tower == "vision":
            clips = batch if batch.ndim == 5 else self.as_clips(batch)
            patches = rearrange(clips, "b c f (h r) (w k) -> b (h w) (c f r k)", r=side, k=side)
            tokens = F.linear(patches, weight.flatten(1))
        else:
            patches = rearrange(batch, "b c (h r) (w k) -> b (h w) (c r k)", r=side, k=side)
            norm = self.stem.get_submodule(f"{self.stem.stem_name}.norm_layer")
            tokens = norm(F.linear(patches, weight.flatten(1)))
        first = self.stem.get_parameter("cls_token").expand(len(tokens), -1, -1)
        return torch.cat([first, tokens], dim=1) + self._positions

    @property
    def _positions(self) -> nn.Parameter:
        """The table that tells tokens where they are."""
        return self.stem.get_parameter(
            "pos_embed" if self.tower == "imu" else "pos_embedding_helper.pos_embed"
        )


class ToyImageBind(ToyEncoder):
    """The toy ImageBind in all its modalities."""

    bound = BOUND

    def __init__(self) -> None:
        self.model = ImageBind(CONFIG, ("image", *BOUND))

    def tower(self, modality: str) -> Tower:
        """The tower for a modality, with what training starts from."""
        return ImageBindTower(self.model, modality)

    def prepare(self, tensor: torch.Tensor, modality: str) -> torch.Tensor:
        """Pictures as cells."""
        return to_cells(tensor) if modality in COARSE else tensor

    def save(self, folder: Path) -> None:
        """Writes weights and config."""
        save_encoder(self.model, CONFIG, folder)


def patch_weight(stem: nn.Module, tower: str) -> nn.Parameter:
    """The weight that makes tokens of a tower's input."""
    names = {"vision": "rgbt_stem.proj.1", "depth": "depth_stem.proj", "imu": "imu_stem.proj"}
    return stem.get_parameter(f"{names.get(tower, 'rgbt_stem.proj')}.weight")


@torch.no_grad()
def _without_level(weight: nn.Parameter) -> None:
    """Starts a stem blind to the level of its input, channel by channel.

    White paper, the distance of a wall and gravity are far larger than what is written on top of
    them, and would be all that a freshly drawn weight passes on.
    """
    channels = weight.flatten(-2) if weight.ndim > 2 else weight.unflatten(1, (IMU_CHANNELS, -1))
    level = channels.mean(dim=-1, keepdim=True).expand_as(channels)
    weight.sub_(level.reshape(weight.shape))

"""ImageBind: six towers whose outputs live in one space.

Written from the paper and from the published checkpoint's key list; a state dict of the original
loads strictly and as it is.

Source: Girdhar et al., "ImageBind: one embedding space to bind them all", CVPR 2023, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from chatbind_cli.encoders.imagebind.config import (
    FIXED_SCALES,
    IMAGE_SIZE,
    IMU_CHANNELS,
    IMU_STEPS,
    TEXT_CONTEXT,
    TEXT_SCALE_MAX,
    TEXT_SCALE_START,
    TOWER_OF,
    TOWERS,
    ImageBindConfig,
)
from chatbind_cli.encoders.imagebind.layers import (
    LogitScale,
    Normalize,
    TextHead,
    Trunk,
    class_token_head,
)
from chatbind_cli.encoders.imagebind.stems import build_stem


class ImageBind(nn.Module):
    """The encoder's network.

    A new model has fresh weights and trains well from scratch at small sizes (Xavier matrices,
    zero biases, tables of 0.02); published weights go in through `load_state_dict`, strictly.

    Args:
        config: sizes.
        modalities: which towers to build, by modality ("image" and "video" share one). All by
            default.
    """

    def __init__(
        self, config: ImageBindConfig, modalities: Iterable[str] = tuple(TOWER_OF)
    ) -> None:
        super().__init__()
        needed = {TOWER_OF[modality] for modality in modalities}
        wanted = [tower for tower in TOWERS if tower in needed]
        self.config = config
        self.modality_preprocessors = nn.ModuleDict(
            {tower: build_stem(tower, config) for tower in wanted}
        )
        self.modality_trunks = nn.ModuleDict({tower: _trunk(tower, config) for tower in wanted})
        self.modality_heads = nn.ModuleDict({tower: _head(tower, config) for tower in wanted})
        self.modality_postprocessors = nn.ModuleDict(
            {tower: _postprocessor(tower) for tower in wanted}
        )
        self._draw_linear_weights()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.modality_trunks.parameters()).dtype

    def forward(self, modality: str, x: torch.Tensor) -> torch.Tensor:
        """Returns the embeddings of a modality, [n, out_embed_dim], in at least float32.

        Rows have norm 1 times the modality's scale. Where an item holds several clips, their
        scaled embeddings are averaged and not normalised again, as published.

        Args:
            modality: one whose tower is there.
            x: image [n, 3, 224, 224]; video [n, 3, 2, 224, 224] or [n, clips, 3, 2, 224, 224];
                audio [n, 1, 128, 204] or [n, clips, 1, 128, 204]; depth and thermal
                [n, 1, 224, 224]; imu [n, 6, 2000]; text ids [n, 77].

        Raises:
            ValueError: a tensor of another shape.
        """
        shape = _clip_shape(modality, self.config)
        if x.shape[1:] == shape:
            return self._embed_clips(modality, x)
        if modality in ("video", "audio") and x.shape[2:] == shape and x.shape[1] > 0:
            each = self._embed_clips(modality, x.flatten(0, 1))
            return each.unflatten(0, x.shape[:2]).mean(dim=1)
        raise ValueError(f"{modality} must be [n, {str(shape)[1:-1]}], not {list(x.shape)}")

    def _embed_clips(self, modality: str, x: torch.Tensor) -> torch.Tensor:
        tower = TOWER_OF[modality]
        stem = self.modality_preprocessors[tower]
        trunk = self.modality_trunks[tower]
        head = self.modality_heads[tower]
        if tower == "text":
            # CLIP's end-of-text token has the highest id of the vocabulary
            embeddings = head(trunk(stem(x), stem.mask), x.argmax(dim=-1))
        else:
            embeddings = head(trunk(stem(x.to(self.dtype))))
        return self.modality_postprocessors[tower](embeddings)

    def _draw_linear_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.MultiheadAttention):
                for projection in module.in_proj_weight.chunk(3):  # torch draws the three as one
                    nn.init.xavier_uniform_(projection)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _clip_shape(modality: str, config: ImageBindConfig) -> tuple[int, ...]:
    """Returns the shape of one item (of one clip, for video and audio) without the batch axis."""
    shapes = {
        "image": (3, IMAGE_SIZE, IMAGE_SIZE),
        "video": (3, config.video_frames, IMAGE_SIZE, IMAGE_SIZE),
        "audio": (1, config.audio_num_mel_bins, config.audio_target_len),
        "depth": (1, IMAGE_SIZE, IMAGE_SIZE),
        "thermal": (1, IMAGE_SIZE, IMAGE_SIZE),
        "imu": (IMU_CHANNELS, IMU_STEPS),
        "text": (TEXT_CONTEXT,),
    }
    return shapes[modality]


def _trunk(tower: str, config: ImageBindConfig) -> Trunk:
    width, depth, heads = config.trunk(tower)
    return Trunk(
        width,
        depth,
        heads,
        bias_kv=tower in FIXED_SCALES,  # all towers but vision and text have the learned pair
        pre_norm=tower == "vision",
    )


def _head(tower: str, config: ImageBindConfig) -> nn.Module:
    width = config.trunk(tower)[0]
    if tower == "text":
        return TextHead(width, config.out_embed_dim)
    dropout = config.imu_head_dropout if tower == "imu" else None
    return class_token_head(width, config.out_embed_dim, dropout=dropout)


def _postprocessor(tower: str) -> nn.Sequential:
    if tower == "text":
        scale = LogitScale(TEXT_SCALE_START, learned=True, maximum=TEXT_SCALE_MAX)
        return nn.Sequential(Normalize(), scale)
    if tower in FIXED_SCALES:
        return nn.Sequential(Normalize(), LogitScale(FIXED_SCALES[tower]))
    return nn.Sequential(Normalize())

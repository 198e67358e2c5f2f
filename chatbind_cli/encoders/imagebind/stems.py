"""From a modality's tensor to the tokens that its trunk reads, one module a tower.

Parameter names are those of the published checkpoint.

Shapes: b batch, t tokens (class token included), d width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from chatbind_cli.encoders.imagebind.config import (
    IMAGE_SIZE,
    IMU_CHANNELS,
    IMU_STEPS,
    TEXT_CONTEXT,
    TEXT_VOCABULARY,
    ImageBindConfig,
)

_TABLE_STD = 0.02  # of fresh class tokens, position and word tables, as in ViT and CLIP


def _table(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.normal_(torch.empty(shape), std=_TABLE_STD))


def _positions(tokens: int, width: int) -> nn.ParameterDict:
    """The learned positions [1, t, d] under the name they are published with."""
    return nn.ParameterDict({"pos_embed": _table(1, tokens, width)})


class _PatchWeight(nn.Module):
    """A convolution's weight [d, c, ...kernel] without bias, applied by the stem that holds it."""

    def __init__(self, width: int, *kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, *kernel))
        nn.init.xavier_uniform_(self.weight.view(width, -1))


class VideoPatches(nn.Module):
    """Clips of frames to patch tokens: [b, 3, frames, rows, columns] -> [b, patches, d].

    Patches do not overlap, so the convolution is a matrix product over rearranged pixels.
    """

    def __init__(self, width: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel = kernel
        # entry 1: in the published model the repetition of still images stands at 0
        self.proj = nn.Sequential(nn.Identity(), _PatchWeight(width, 3, *kernel))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the patch tokens, frame-major, then row by row."""
        frames, rows, columns = self.kernel
        pixels = rearrange(
            x,
            "b c (t f) (h r) (w k) -> b (t h w) (c f r k)",
            f=frames,
            r=rows,
            k=columns,
        )
        return F.linear(pixels, self.proj.get_parameter("1.weight").flatten(1))


class PlanePatches(nn.Module):
    """One-channel planes to normalised patch tokens: [b, 1, rows, columns] -> [b, patches, d].

    Args:
        width: d.
        kernel: side of a patch.
        stride: distance of neighbouring patches.
    """

    def __init__(self, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.proj = _PatchWeight(width, 1, kernel, kernel)
        self.norm_layer = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the patch tokens, row by row."""
        weight = self.proj.weight
        # as a matrix product: on GPUs cuDNN's convolutions would round float32 to TF32 by default
        pixels = F.unfold(x, weight.shape[-2:], stride=self.stride)  # [b, kernel area, patches]
        return self.norm_layer(F.linear(pixels.mT, weight.flatten(1)))


class WindowTokens(nn.Module):
    """Motion recordings to normalised window tokens: [b, 6, steps] -> [b, windows, d]."""

    def __init__(self, width: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.proj = nn.Linear(IMU_CHANNELS * window, width, bias=False)
        self.norm_layer = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the tokens in time order; a window lists channel by channel."""
        windows = rearrange(x, "b c (t s) -> b t (c s)", s=self.window)
        return self.norm_layer(self.proj(windows))


class VisionStem(nn.Module):
    """Images or clips to tokens; an image becomes a clip of equal frames."""

    def __init__(self, config: ImageBindConfig) -> None:
        super().__init__()
        frames, rows, columns = config.kernel_size
        patches = config.video_frames // frames * (IMAGE_SIZE // rows) * (IMAGE_SIZE // columns)
        width = config.vision_embed_dim
        self.frames = config.video_frames
        self.rgbt_stem = VideoPatches(width, config.kernel_size)
        self.cls_token = _table(1, 1, width)
        self.pos_embedding_helper = _positions(1 + patches, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns [b, t, d] for [b, 3, 224, 224] or [b, 3, frames, 224, 224]."""
        if x.ndim == 4:
            x = repeat(x, "b c h w -> b c f h w", f=self.frames)
        tokens = _with_class_token(self.cls_token, self.rgbt_stem(x))
        return tokens + self.pos_embedding_helper["pos_embed"]


class PlaneStem(nn.Module):
    """Mel spectrograms, depth maps or thermal pictures to tokens.

    Args:
        stem_name: the name under which the patch weights are published.
        width: d.
        kernel: side of a patch.
        stride: distance of neighbouring patches.
        size: rows and columns of the input.
    """

    def __init__(
        self, stem_name: str, width: int, *, kernel: int, stride: int, size: tuple[int, int]
    ) -> None:
        super().__init__()
        rows, columns = ((side - kernel) // stride + 1 for side in size)
        self.stem_name = stem_name
        self.add_module(stem_name, PlanePatches(width, kernel, stride))
        self.cls_token = _table(1, 1, width)
        self.pos_embedding_helper = _positions(1 + rows * columns, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns [b, t, d] for [b, 1, rows, columns]."""
        tokens = _with_class_token(self.cls_token, self.get_submodule(self.stem_name)(x))
        return tokens + self.pos_embedding_helper["pos_embed"]


class ImuStem(nn.Module):
    """Motion recordings of 2000 steps to tokens."""

    def __init__(self, config: ImageBindConfig) -> None:
        super().__init__()
        width = config.imu_embed_dim
        self.imu_stem = WindowTokens(width, config.imu_kernel_size)
        self.cls_token = _table(1, 1, width)
        self.pos_embed = _table(1, 1 + IMU_STEPS // config.imu_kernel_size, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns [b, t, d] for [b, 6, 2000]."""
        return _with_class_token(self.cls_token, self.imu_stem(x)) + self.pos_embed


class TextStem(nn.Module):
    """Token ids to tokens, and the causal mask that the text trunk works under."""

    mask: torch.Tensor

    def __init__(self, config: ImageBindConfig) -> None:
        super().__init__()
        width = config.text_embed_dim
        self.token_embedding = nn.Embedding(TEXT_VOCABULARY, width)
        nn.init.normal_(self.token_embedding.weight, std=_TABLE_STD)
        self.pos_embed = _table(1, TEXT_CONTEXT, width)
        future = torch.full((TEXT_CONTEXT, TEXT_CONTEXT), float("-inf"))
        self.register_buffer("mask", future.triu(1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns [b, 77, d] for ids [b, 77]."""
        return self.token_embedding(ids) + self.pos_embed


def build_stem(tower: str, config: ImageBindConfig) -> nn.Module:
    """Returns the stem of a tower, with fresh weights."""
    if tower == "vision":
        return VisionStem(config)
    if tower == "text":
        return TextStem(config)
    if tower == "imu":
        return ImuStem(config)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    kernel = stride = getattr(config, f"{tower}_kernel_size")
    if tower == "audio":
        size, stride = (config.audio_num_mel_bins, config.audio_target_len), config.audio_stride
    name = "depth_stem" if tower == "depth" else "rgbt_stem"
    return PlaneStem(name, config.trunk(tower)[0], kernel=kernel, stride=stride, size=size)


def _with_class_token(cls_token: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([cls_token.expand(len(tokens), -1, -1), tokens], dim=1)

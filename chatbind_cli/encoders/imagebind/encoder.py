"""The encoder that the rest of ChatBind uses: media in, embeddings out.

Towers are read when the first medium of their modality comes. An embedding never depends on what
else is in the batch: runs that stop and go on give the same bytes as runs that do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from chatbind_cli.encoders.imagebind.config import (
    HUGE,
    TEXT_CONTEXT,
    TOWER_OF,
    ImageBindConfig,
)
from chatbind_cli.encoders.imagebind.model import ImageBind, towers_of
from chatbind_cli.encoders.imagebind.weights import (
    check_towers,
    find_encoder,
    load_tower,
    save_encoder,
)
from chatbind_cli.errors import ChatBindError, UsageError, WeightsError
from chatbind_cli.files import sha256_file

if TYPE_CHECKING:
    from chatbind_cli.encoders.imagebind.preprocess import Decoded

__all__ = ["Encoder", "load_encoder", "save_encoder"]

DEFAULT_BATCH_SIZE = 16

_KERNELS = {
    "eager": [SDPBackend.MATH],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}
"""PyTorch's own attention kernels by the first word of a name, the one to take first in front; it
chooses itself for `auto` and `sdpa`. The text tower's causal mask does not fit the flash kernel."""


class Encoder:
    """A frozen ImageBind with its weights' identity. Made by `load_encoder`; not thread-safe.

    Attributes:
        name: "imagebind_huge", or the name of the folder that the weights lie in.
        path: the weights file.
        config: the sizes.
        towers: the towers the weights file holds.
        device: where the towers work.
        dtype: of the weights; embeddings come out in float32.
        batch_size: clips (pictures, ...) that go through a tower at once.
        attn_implementation: see `load_encoder`.
        loaded: the towers that are in memory.
    """

    def __init__(
        self,
        path: Path,
        config: ImageBindConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
        attn_implementation: str = "auto",
    ) -> None:
        self.name = "imagebind_huge" if config == HUGE else path.resolve().parent.name
        self.path = path
        self.config = config
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self.attn_implementation = attn_implementation
        self._kernels = _kernels(attn_implementation, device, dtype)
        self.towers = check_towers(path, config)
        self.loaded: dict[str, ImageBind] = {}

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the weights file, hexadecimal; computed when first asked for."""
        return sha256_file(self.path)

    @property
    def dtype_name(self) -> str:
        """`float32`, `bfloat16`, ..."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def embedding_dim(self) -> int:
        """Length of an embedding (1024 for Huge)."""
        return self.config.out_embed_dim

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it can encode: image, video, ... and text, as far as the weights have towers."""
        return tuple(modality for modality, tower in TOWER_OF.items() if tower in self.towers)

    def load(self, modalities: Iterable[str]) -> None:
        """Reads the towers of these modalities now rather than at first use.

        Raises:
            WeightsError: the weights file does not hold one of them.
        """
        for tower in towers_of(modalities):
            self._tower(tower)

    def embed(self, media: Sequence[Decoded], *, normalize: bool) -> torch.Tensor:
        """Returns the embeddings of media, float32 [n, embedding_dim] on the CPU, in order.

        Args:
            media: any modalities, mixed.
            normalize: True: every row has norm 1. False: rows as published, which means scaled
                (audio 20, depth and IMU 5, thermal 10, images and videos 1), the clips of a
                recording averaged after scaling.

        Raises:
            WeightsError: the weights have no tower for a medium.
        """
        rows = torch.empty(len(media), self.embedding_dim)
        kinds: dict[tuple[str, torch.Size], list[int]] = {}
        for index, medium in enumerate(media):
            kinds.setdefault((medium.modality, medium.tensor.shape), []).append(index)
        for (modality, _), indices in kinds.items():
            rows[indices] = self._embed_equal(modality, [media[i].tensor for i in indices])
        return F.normalize(rows, dim=-1) if normalize else rows

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Returns text embeddings with the learned scale, float32 [n, embedding_dim].

        The dot product with normalised media embeddings gives logits of a softmax over texts.

        Raises:
            ChatBindError: CLIP's tokenizer is not installed (extra `text`).
            WeightsError: the weights have no text tower.
        """
        if not texts:
            return torch.empty(0, self.embedding_dim)
        return self._embed_equal("text", list(tokenize(texts)))

    def _embed_equal(self, modality: str, items: Sequence[torch.Tensor]) -> torch.Tensor:
        """Embeds items of one shape, each as if it were alone."""
        model = self._tower(TOWER_OF[modality])
        clips = items[0].shape[0] if modality in ("video", "audio") else 1
        # Matrix products round differently at different sizes: a CPU, which gains nothing from
        # batches, takes one item at a time; batches for a GPU are all filled up to one size.
        at_once = 1 if self.device.type == "cpu" else max(1, self.batch_size // clips)
        rows = []
        with torch.inference_mode(), self._attention():
            for start in range(0, len(items), at_once):
                part = list(items[start : start + at_once])
                filled = part + part[-1:] * (at_once - len(part))
                rows.append(model.embed(modality, self._on_device(filled))[: len(part)].float())
        # once: until here nothing has waited for a GPU
        return torch.cat(rows).cpu()

    def _on_device(self, items: Sequence[torch.Tensor]) -> torch.Tensor:
        """Items as a batch; the copy to a GPU is left to go on by itself."""
        batch = torch.stack(list(items))
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        return batch.to(self.device, non_blocking=True)

    def _attention(self) -> AbstractContextManager[Any]:
        chosen = self._kernels
        return nullcontext() if chosen is None else sdpa_kernel(chosen, set_priority=True)

    def _tower(self, tower: str) -> ImageBind:
        if tower not in self.loaded:
            if tower not in self.towers:
                raise WeightsError(
                    f"these weights have no {tower} tower, only {', '.join(self.towers)}",
                    where=str(self.path),
                )
            self.loaded[tower] = load_tower(
                self.path, self.config, tower, device=self.device, dtype=self.dtype
            )
        return self.loaded[tower]


def load_encoder(
    path: str | Path,
    *,
    modalities: Iterable[str] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = DEFAULT_BATCH_SIZE,
    attn_implementation: str = "auto",
) -> Encoder:
    """Returns the encoder in a weights file or folder; only the towers asked for are read.

    Args:
        path: ImageBind's weights (`.pth` or `.safetensors`; Huge unless a config.json of an
            encoder lies beside them), or a folder with weights and config.json.
        modalities: the towers to read now; None reads each when its first medium comes.
        device: where to run.
        dtype: what to convert the weights to.
        batch_size: clips that go through a tower at once; a CPU takes one recording at a time.
        attn_implementation: `auto` and `sdpa` let PyTorch choose among its kernels; `eager` is
            plain arithmetic; `flash_attention_2` and `flash_attention_3` mean PyTorch's own flash
            kernel, whatever packages are installed.

    Raises:
        UsageError: there is no such attention, or it does not work on the device in the dtype.
        WeightsError: no weights there, they do not fit the config (the first key that differs is
            named), or a tower that is asked for is not among them.
    """
    encoder = Encoder(
        *find_encoder(Path(path)),
        device=torch.device(device),
        dtype=dtype,
        batch_size=batch_size,
        attn_implementation=attn_implementation,
    )
    if modalities is not None:
        encoder.load(modalities)
    return encoder


def tokenize(texts: Sequence[str]) -> torch.Tensor:
    """Returns the ids of CLIP's byte pairs, int64 [n, 77]: start, text, end-of-text, zeros.

    Longer texts are cut; the last place is then the end-of-text token.

    Raises:
        ChatBindError: open_clip_torch is not installed.
    """
    try:
        from open_clip.tokenizer import SimpleTokenizer  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ChatBindError(
            "texts need CLIP's tokenizer, which is not installed",
            hint="pip install 'chatbind[text]'",
        ) from error
    return _made(SimpleTokenizer)(list(texts), context_length=TEXT_CONTEXT)


@cache
def _made(tokenizer: Callable[[], Any]) -> Any:
    """A tokenizer, whose vocabulary takes a while to read."""
    return tokenizer()


def _kernels(name: str, device: torch.device, dtype: torch.dtype) -> list[SDPBackend] | None:
    if name in ("auto", "sdpa"):
        return None
    kind = name.partition("_")[0]
    if kind not in _KERNELS:
        raise UsageError(f"--attn-implementation {name} is not known")
    half = dtype in (torch.float16, torch.bfloat16)
    if kind == "flash" and not (device.type == "cuda" and half):
        raise UsageError(
            f"--attn-implementation {name}: ImageBind has it on an NVIDIA GPU in float16 or "
            f"bfloat16, and here it runs on {device.type} in {str(dtype).removeprefix('torch.')}",
            hint="auto takes what works here",
        )
    return _KERNELS[kind]

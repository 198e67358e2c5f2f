"""What the rest of ChatBind knows of an encoder: media in, embeddings out.

An encoder reads media into tensors of its own (`read`, in any process) and turns those into
embeddings (`embed`). Towers are read from disk when the first medium of their modality comes. An
embedding never depends on what else is in the batch: runs that stop and go on give the same bytes
as runs that do not.
"""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from chatbind_cli.console import note
from chatbind_cli.errors import MediaError, UsageError, WeightsError, contained
from chatbind_cli.media.modality import MODALITIES
from chatbind_cli.media.options import FIELDS, MediaOptions
from chatbind_cli.media.sniff import sniff
from chatbind_cli.media.source import MediaSource, open_source, shown

Read = Callable[[MediaSource, str, MediaOptions], torch.Tensor]
"""Makes an encoder's own tensor of a medium of one of its modalities. It goes to the processes that
decode, and so carries no weights."""

_KERNELS = {
    "eager": [SDPBackend.MATH],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}
"""PyTorch's own attention kernels by the first word of a name, the one to take first in front; it
chooses itself for `auto` and `sdpa`. The text tower's causal mask does not fit the flash kernel."""


@dataclass(frozen=True, eq=False)
class Decoded:
    """One medium as its encoder wants it: a tensor whose shape the encoder's `read` tells."""

    source: MediaSource
    modality: str
    tensor: torch.Tensor


class Encoder(ABC):
    """A frozen encoder with its weights' identity. Made by `open_encoder`; not thread-safe.

    Args:
        reference: what opens it again: an absolute path, or `hf:OWNER/NAME`, `timm:NAME`, ...
        name: for people.
        device: where the towers work.
        dtype: of the weights; embeddings come out in float32.
        batch_size: clips (pictures, ...) that go through a tower at once.
        attn_implementation: see `open_encoder`.

    Attributes:
        loaded: the towers that are in memory, by modality.
    """

    licence: str | None = None
    """Of published weights; None where nobody has said."""

    scale_of_media: ClassVar[bool] = False
    """Whether embeddings of media, rather than those of texts, carry the scale that makes their dot
    product with the others logits of a softmax over texts."""

    shared_towers: ClassVar[Mapping[str, str]] = {}
    """Modalities that go through the tower of another one."""

    read: Read
    """How it reads media; see `load_media`."""

    def __init__(
        self,
        *,
        reference: str,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
        attn_implementation: str,
    ) -> None:
        self.reference = reference
        self.name = name
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self.attn_implementation = attn_implementation
        self.loaded: dict[str, torch.nn.Module] = {}
        self._kernels = _kernels(attn_implementation, device, dtype)

    @property
    @abstractmethod
    def sha256(self) -> str:
        """SHA-256 over the weights, hexadecimal; computed when first asked for."""

    @property
    def sha256_before(self) -> frozenset[str]:
        """Its hashes before towers were added: what was trained then is trained with it."""
        return frozenset()

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The sizes, and what else decides an embedding beside the weights, as JSON values."""

    @property
    @abstractmethod
    def embedding_dim(self) -> int:
        """Length of an embedding."""

    @property
    @abstractmethod
    def modalities(self) -> tuple[str, ...]:
        """What it can encode: image, video, ... and text, as far as there are towers."""

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """The ids of texts, int64 [n, context]: what a text tower takes, if there is one.

        Raises:
            ChatBindError: the tokenizer is not installed.
        """
        raise NotImplementedError

    @abstractmethod
    def load_tower(self, modality: str) -> torch.nn.Module:
        """Reads the network for a modality that it has; called by `tower`, once.

        Raises:
            WeightsError: it cannot be read.
        """

    def tower(self, modality: str) -> torch.nn.Module:
        """The network for a modality, read when first asked for.

        Raises:
            WeightsError: there is none, or it cannot be read.
        """
        place = self.shared_towers.get(modality, modality)
        if place not in self.loaded:
            if place not in self.modalities:
                raise self.lacks(modality)
            self.loaded[place] = self.load_tower(place)
        return self.loaded[place]

    def run(self, modality: str, batch: torch.Tensor) -> torch.Tensor:
        """Sends a batch of equal shapes [n, ...] through the tower: [n, embedding_dim]."""
        made: torch.Tensor = self.tower(modality)(batch)
        return made

    def clips(self, item: Decoded) -> int:
        """How many pictures or clips one medium takes of a batch."""
        return 1

    def heeds(self, modality: str, options: MediaOptions) -> Collection[str]:
        """The fields of `MediaOptions` that decide what `read` makes of a modality.

        Every kind that looks at fewer than there are says so here; the limits are none of them.

        Args:
            modality: any, also one that there is no tower for.
            options: where it depends on others whether one decides.
        """
        return FIELDS[modality]

    def heeded(self, options: MediaOptions) -> MediaOptions:
        """The options with those that decide nothing here at their defaults, told in a note.

        What names or hashes options (stores, caches, models) must have these: two that make the
        same tensors are then the same.
        """
        kept = options.only({name for m in MODALITIES for name in self.heeds(m, options)})
        idle = [n for n, value in asdict(options).items() if value != getattr(kept, n)]
        if idle:
            named = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
            note(f"{self.name} takes no notice of {named}")
        return kept

    @property
    def parts(self) -> tuple[Encoder, ...]:
        """The encoders that it consists of: several side by side, or itself."""
        return (self,)

    def lacks(self, modality: str) -> WeightsError:
        """The error of a modality that it has no tower for."""
        known = ", ".join(self.modalities)
        return WeightsError(f"has no tower for {modality}, only for {known}", where=self.reference)

    def compare(self, embedding: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """How well texts fit a medium: logits of a softmax over them, [texts].

        Args:
            embedding: of the medium, [embedding_dim], as published.
            texts: what `embed_texts` gave, [texts, embedding_dim].
        """
        medium = embedding if self.scale_of_media else F.normalize(embedding, dim=-1)
        return texts @ medium

    @property
    def dtype_name(self) -> str:
        """`float32`, `bfloat16`, ..."""
        return str(self.dtype).removeprefix("torch.")

    def embed(self, media: Sequence[Decoded], *, normalize: bool) -> torch.Tensor:
        """Returns the embeddings of media, float32 [n, embedding_dim] on the CPU, in order.

        Args:
            media: any modalities, mixed.
            normalize: True: every row has norm 1. False: rows as published, which means with the
                scale of their modality.

        Raises:
            WeightsError: there is no tower for a medium.
        """
        rows = torch.empty(len(media), self.embedding_dim)
        kinds: dict[tuple[str, torch.Size], list[int]] = {}
        for index, medium in enumerate(media):
            kinds.setdefault((medium.modality, medium.tensor.shape), []).append(index)
        for indices in kinds.values():
            rows[indices] = self._embed_equal([media[i] for i in indices])
        return F.normalize(rows, dim=-1) if normalize else rows

    def texts_beside(self, modality: str) -> str:
        """What `embed` takes texts for where media of a modality are compared with them.

        It is `text` but for models that have several heads for texts.
        """
        return "text"

    def embed_texts(self, texts: Sequence[str], modality: str = "image") -> torch.Tensor:
        """Returns text embeddings as published, float32 [n, embedding_dim]; see `scale_of_media`.

        Args:
            texts: of any length.
            modality: of the media that they are compared with.

        Raises:
            ChatBindError: the tokenizer is not installed (extra `text`).
            WeightsError: there is no text tower.
        """
        kind = self.texts_beside(modality)
        read = [replace(self.read_text(text), modality=kind) for text in texts]
        return self.embed(read, normalize=False)

    def read_text(self, text: str) -> Decoded:
        """A text as the encoder wants it.

        Raises:
            WeightsError: there is no text tower.
            ChatBindError: the tokenizer is not installed (extra `text`).
        """
        if "text" not in self.modalities:
            raise self.lacks("text")
        source = MediaSource("<text>", data=text.encode())
        return Decoded(source, "text", self.tokenize([text])[0])

    def _embed_equal(self, items: Sequence[Decoded]) -> torch.Tensor:
        """Embeds items of one modality and shape, each as if it were alone."""
        modality = items[0].modality
        self.tower(modality)
        # Matrix products round differently at different sizes: a CPU, which gains nothing from
        # batches, takes one item at a time; batches for a GPU are all filled up to one size.
        cpu = self.device.type == "cpu"
        at_once = 1 if cpu else max(1, self.batch_size // self.clips(items[0]))
        rows = []
        kernels = self._kernels
        attention = sdpa_kernel(kernels, set_priority=True) if kernels else nullcontext()
        with torch.inference_mode(), attention:
            for start in range(0, len(items), at_once):
                part = [item.tensor for item in items[start : start + at_once]]
                filled = part + part[-1:] * (at_once - len(part))
                rows.append(self.run(modality, self._on_device(filled))[: len(part)].float())
        # copied once: until here nothing has waited for a GPU; too small a shape is not broadcast
        return torch.cat(rows).cpu().view(len(items), self.embedding_dim)

    def _on_device(self, items: Sequence[torch.Tensor]) -> torch.Tensor:
        """Items as a batch; the copy to a GPU is left to go on by itself."""
        batch = torch.stack(list(items))
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        return batch.to(self.device, non_blocking=True)


def _kernels(name: str, device: torch.device, dtype: torch.dtype) -> list[SDPBackend] | None:
    if name in ("auto", "sdpa"):
        return None
    kind = name.partition("_")[0]
    if kind not in _KERNELS:
        raise UsageError(f"--attn-implementation {name} is not known")
    half = dtype in (torch.float16, torch.bfloat16)
    if kind == "flash" and not (device.type == "cuda" and half):
        raise UsageError(
            f"--attn-implementation {name}: encoders have it on an NVIDIA GPU in float16 or "
            f"bfloat16, and here it runs on {device.type} in {str(dtype).removeprefix('torch.')}",
            hint="auto takes what works here",
        )
    return _KERNELS[kind]


def load_media(
    read: Read,
    source: MediaSource | str | Path | bytes,
    modality: str | None = None,
    options: MediaOptions = MediaOptions(),  # noqa: B008 (frozen, so safe to share)
) -> Decoded:
    """Reads one file, URL, data URI or byte string.

    Args:
        read: of the encoder that will see it.
        source: an opened source, or whatever `open_source` takes.
        modality: what it is; None looks at the content.
        options: how to read it.

    Raises:
        ChatBindError: it cannot be found, told or read, whatever a library raised on the way.
        UsageError: `modality` is not the name of a modality.
    """
    if modality is not None and modality not in MODALITIES:
        raise UsageError(f"{modality!r} is not a modality", hint=f"one of {', '.join(MODALITIES)}")
    where = source.name if isinstance(source, MediaSource) else "<bytes>"
    try:
        if isinstance(source, (str, Path)):
            where = shown(str(source))
        opened = source if isinstance(source, MediaSource) else open_source(source)
        found = modality if modality is not None else sniff(opened)
        tensor = read(opened, found, options)
    except Exception as error:
        _let_go(error)
        failure = contained(error, where=where)
        if failure is error:
            raise
        raise failure from error
    if not tensor.isfinite().all():
        # no encoder is to see it: one such value makes a whole embedding NaN
        raise MediaError(f"gives numbers that no {found} has (NaN or infinity)", where=where)
    return Decoded(source=opened, modality=found, tensor=tensor)


def _let_go(error: BaseException | None) -> None:
    """Empties the frames of an error: it may be kept for long, and they hold what was decoded."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__

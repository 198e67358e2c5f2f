"""A checkpoint of one or many files as one table of tensors, read without holding it in memory.

Takes a folder (Hugging Face layout, safetensors or `.bin`, with or without an index), an index
file, or a single weights file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.checkpoints.safetensors_file import TensorFile, TensorInfo, open_safetensors
from chatbind_cli.checkpoints.torch_file import open_torch
from chatbind_cli.errors import CheckpointError, WeightsError

# The form that cannot carry code comes first.
INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
_PROJECTOR_NAME = "projector.safetensors"  # what stage 1 saves in place of the frozen weights
# In the order in which transformers looks for them, too: what is checked is what is loaded.
_LAYOUTS = (WEIGHT_NAMES[0], INDEX_NAMES[0], WEIGHT_NAMES[1], INDEX_NAMES[1], _PROJECTOR_NAME)

WORD_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
)
"""How the name of a language model's table of word embeddings ends."""

_CHUNK_ELEMENTS = 8 << 20


class Checkpoint:
    """Named tensors over the files of a checkpoint. A context manager.

    Data come by offset and length into memory that the caller brings, so memory stays bounded
    however large the files, and nothing is mapped. One thread at a time may read.

    Attributes:
        path: what was opened.
        folder: the folder that its files lie in.
        files: the files, in reading order.
        tensors: name -> shape and dtype, file by file.
    """

    def __init__(self, path: Path, files: Sequence[TensorFile]) -> None:
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self.files = files
        self.tensors: dict[str, TensorInfo] = {}
        self._path_of: dict[str, Path] = {}
        self._handles: dict[Path, int] = {}
        self._turned: tuple[str, torch.Tensor] | None = None
        for file in files:
            for name, info in file.tensors.items():
                if name in self.tensors:
                    raise WeightsError(
                        f"tensor {name} is in {self._path_of[name].name} too",
                        where=str(file.path),
                    )
                self.tensors[name] = info
                self._path_of[name] = file.path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The folder's `config.json`, empty where there is none.

        Raises:
            CheckpointError: it cannot be read.
        """
        config = read_json(self.folder / "config.json", missing_ok=True)
        if not isinstance(config.get("text_config") or {}, dict):
            where = str(self.folder / "config.json")
            raise CheckpointError("text_config is not a JSON object", where=where)
        return config

    @property
    def text_config(self) -> dict[str, Any]:
        """What `config` says of the language model, which ours have in a part of its own."""
        return self.config.get("text_config") or self.config

    def __enter__(self) -> Checkpoint:
        """Opens nothing: files open as they are read."""
        return self

    def __exit__(self, *error: object) -> None:
        """Gives back memory and handles."""
        self.close()

    def close(self) -> None:
        """Gives back memory and handles; the next read opens the files again."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles = {}
        self._turned = None

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor.

        Raises:
            WeightsError: there is none of that name.
        """
        if name not in self.tensors:
            raise WeightsError(f"has no tensor {name}", where=str(self.path))
        return self.tensors[name]

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fills `out` with a tensor's elements from `start` on, in row-major order.

        `start` counts elements; `out` is 1-D, contiguous, of the tensor's dtype.

        Raises:
            WeightsError: there is no such tensor, or its data cannot be read.
        """
        info = self.info(name)
        if info.strides is not None:
            out.copy_(self._in_row_major_order(name, info.strides)[start : start + out.numel()])
        elif out.numel():
            self._fill(name, info.begin + start * info.dtype.itemsize, out)

    def _in_row_major_order(self, name: str, strides: tuple[int, ...]) -> torch.Tensor:
        """A tensor that was saved turned or with gaps: read whole, and kept for its next piece."""
        if self._turned is None or self._turned[0] != name:
            info = self.tensors[name]
            steps = ((size - 1) * stride for size, stride in zip(info.shape, strides, strict=True))
            span = torch.empty(1 + sum(steps), dtype=info.dtype)
            self._fill(name, info.begin, span)
            self._turned = (name, span.as_strided(info.shape, strides).reshape(-1))
        return self._turned[1]

    def _fill(self, name: str, position: int, out: torch.Tensor) -> None:
        path = self._path_of[name]
        view = out.view(torch.uint8).numpy().data
        try:
            if path not in self._handles:
                self._handles[path] = os.open(path, os.O_RDONLY)
                if hasattr(os, "posix_fadvise"):  # the kernel reads further ahead
                    os.posix_fadvise(self._handles[path], 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while view:
                n = os.preadv(self._handles[path], [view], position)
                if not n:
                    raise WeightsError("ends before its last tensor", where=str(path))
                view, position = view[n:], position + n
        except OSError as error:
            raise WeightsError(f"tensor {name}: {error}", where=str(path)) from error

    def read_flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` in row-major order as a fresh 1-D tensor.

        Raises:
            WeightsError: there is no such tensor, or its data cannot be read.
        """
        piece = torch.empty(stop - start, dtype=self.info(name).dtype)
        self.read_into(name, start, piece)
        return piece

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, fresh in memory.

        Raises:
            WeightsError: as for `read_flat`.
        """
        info = self.info(name)
        return self.read_flat(name, 0, info.numel).view(info.shape)

    def chunks(self, name: str, elements: int = _CHUNK_ELEMENTS) -> Iterator[torch.Tensor]:
        """The tensor's elements in order, in 1-D pieces of at most `elements`."""
        numel = self.info(name).numel
        for start in range(0, numel, elements):
            yield self.read_flat(name, start, min(start + elements, numel))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a checkpoint folder, index file or weights file.

    Raises:
        CheckpointError: there is nothing there, or the folder holds no weights.
        WeightsError: a file is broken, an index names a file outside its folder, or index and
            files disagree.
    """
    path = Path(path)
    if path.is_dir():
        return Checkpoint(path, _open_folder(path))
    if not path.is_file():
        raise CheckpointError("no such file or folder", where=str(path), hint="check the path")
    if path.name.endswith(".index.json"):
        return Checkpoint(path, _open_index(path))
    return Checkpoint(path, [open_tensor_file(path)])


def folder_of(path: Path) -> Path:
    """The folder that a path means where folders are read whole: itself, or that of its weights.

    Raises:
        WeightsError: it is a file that is not what is read of its folder.
        CheckpointError: as `open_checkpoint`.
    """
    if path.is_dir():
        return path
    read = [file.path.name for file in open_checkpoint(path.parent).files]
    if path.name not in read:
        raise WeightsError(
            f"is not what is read of its folder, which is {read[0]}",
            where=str(path),
            hint="name the folder, or move the file to one of its own, with what lies beside it",
        )
    return path.parent


def _open_folder(folder: Path) -> list[TensorFile]:
    for name in _LAYOUTS:
        if (folder / name).is_file():
            if name in INDEX_NAMES:
                return _open_index(folder / name)
            return [open_tensor_file(folder / name)]
    loose = [
        file
        for file in sorted(folder.iterdir())
        if file.suffix in (".safetensors", ".bin", ".pth", ".pt") and file.is_file()
    ]
    # Files that a trainer leaves beside a checkpoint are no weights.
    loose = [file for file in loose if file.name not in ("training_args.bin", "optimizer.pt")]
    if len(loose) == 1:
        return [open_tensor_file(loose[0])]
    raise CheckpointError(
        "holds no weights" if not loose else f"holds {len(loose)} weights files and no index",
        where=str(folder),
        hint=f"expected {WEIGHT_NAMES[0]}, {WEIGHT_NAMES[1]} or one of their indexes",
    )


def _open_index(path: Path) -> list[TensorFile]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise WeightsError("index has no weight_map", where=str(path))
    shards: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        # By name, not by resolved path: the hub's cache keeps shards as links into another folder.
        outside = not isinstance(shard, str) or (
            shard not in shards and (shard != Path(shard).name or shard in ("", ".", ".."))
        )
        if outside:
            raise WeightsError(
                f"index names a file outside its folder: {shard!r:.100}", where=str(path)
            )
        shards.setdefault(shard, []).append(tensor)
    for shard in sorted(shards):
        if not (path.parent / shard).is_file():
            raise WeightsError(
                f"shard {shard} is missing", where=str(path.parent), hint="fetch it again"
            )
    files: list[TensorFile] = []
    for shard in sorted(shards):
        file = open_tensor_file(path.parent / shard)
        missing = [tensor for tensor in shards[shard] if tensor not in file.tensors]
        if missing:
            raise WeightsError(
                f"index says that {missing[0]} is in here, and it is not", where=str(file.path)
            )
        files.append(file)
    return files


def open_tensor_file(path: Path) -> TensorFile:
    """Looks into a weights file, by its content, whatever its name ends in.

    Raises:
        WeightsError: it is neither safetensors nor a torch file, is cut short, or holds anything
            but named tensors.
    """
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise WeightsError(error.strerror or "cannot be read", where=str(path)) from error
    if len(head) == 9 and head[8:9] == b"{":
        return open_safetensors(path)
    if head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return open_torch(path)
    if head.startswith(b"version h"):
        raise WeightsError(
            "is a Git LFS pointer, not the weights",
            where=str(path),
            hint="fetch the file itself, for instance with `chatbind download`",
        )
    raise WeightsError("is neither a safetensors nor a torch file", where=str(path))

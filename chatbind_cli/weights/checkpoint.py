"""A checkpoint of one or many files as one table of tensors, read without holding it in memory.

Takes a folder (Hugging Face layout, safetensors or `.bin`, with or without an index), an index
file, or a single weights file. Knows nothing of what the tensors mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from chatbind_cli.errors import CheckpointError, WeightsError
from chatbind_cli.weights.json_file import read_json
from chatbind_cli.weights.tensor_file import TensorFile, TensorInfo, open_tensor_file

# The form that cannot carry code comes first.
INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
_PROJECTOR_NAME = "projector.safetensors"  # what stage 1 saves in place of the frozen weights
# In the order in which transformers looks for them, too: what is checked is what is loaded.
_LAYOUTS = (WEIGHT_NAMES[0], INDEX_NAMES[0], WEIGHT_NAMES[1], INDEX_NAMES[1], _PROJECTOR_NAME)

CHUNK_ELEMENTS = 8 << 20


class Checkpoint:
    """Named tensors over the files of a checkpoint. A context manager.

    Attributes:
        path: what was opened.
        folder: the folder that its files lie in.
        tensors: name -> shape and dtype, file by file in reading order.
        config: the folder's `config.json`, empty where there is none.
    """

    def __init__(self, path: Path, folder: Path, files: list[TensorFile]) -> None:
        self.path = path
        self.folder = folder
        self.files = files
        self.tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, TensorFile] = {}
        for file in files:
            for name, info in file.tensors.items():
                if name in self.tensors:
                    raise WeightsError(
                        f"tensor {name} is in {self._file_of[name].path.name} too",
                        where=str(file.path),
                    )
                self.tensors[name] = info
                self._file_of[name] = file
        self.config: dict[str, Any] = read_json(folder / "config.json", missing_ok=True)
        if not isinstance(self.config.get("text_config") or {}, dict):
            raise CheckpointError(
                "text_config is not a JSON object", where=str(folder / "config.json")
            )

    def __enter__(self) -> Checkpoint:
        """Opens nothing: files open as they are read."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Gives back memory and handles."""
        self.close()

    def close(self) -> None:
        """Gives back memory and handles."""
        for file in self.files:
            file.release()

    def __contains__(self, name: object) -> bool:
        """Whether a tensor of that name is there."""
        return name in self.tensors

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor.

        Raises:
            WeightsError: there is none of that name.
        """
        if name not in self.tensors:
            raise WeightsError(f"has no tensor {name}", where=str(self.path))
        return self.tensors[name]

    def read_flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` in row-major order as a fresh 1-D tensor.

        Raises:
            WeightsError: there is no such tensor, or its data cannot be read.
        """
        self.info(name)
        return self._file_of[name].read_flat(name, start, stop)

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fills a 1-D tensor of the same dtype with elements from `start` on.

        Raises:
            WeightsError: as for `read_flat`.
        """
        self.info(name)
        self._file_of[name].read_into(name, start, out)

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, fresh in memory.

        Raises:
            WeightsError: as for `read_flat`.
        """
        info = self.info(name)
        return self.read_flat(name, 0, info.numel).view(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` (along the first axis), fresh in memory; the rest is not read.

        Raises:
            WeightsError: as for `read_flat`, or the tensor has no such rows.
        """
        info = self.info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise WeightsError(
                f"tensor {name} of shape {list(info.shape)} has no rows {start} to {stop}",
                where=str(self.path),
            )
        width = info.numel // info.shape[0] if info.shape[0] else 0
        flat = self.read_flat(name, start * width, stop * width)
        return flat.view(stop - start, *info.shape[1:])

    def chunks(self, name: str, elements: int = CHUNK_ELEMENTS) -> Iterator[torch.Tensor]:
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
        return Checkpoint(path, path, _open_folder(path))
    if not path.is_file():
        raise CheckpointError("no such file or folder", where=str(path), hint="check the path")
    if path.name.endswith(".index.json"):
        return Checkpoint(path, path.parent, _open_index(path))
    return Checkpoint(path, path.parent, [open_tensor_file(path)])


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

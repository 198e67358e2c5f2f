"""One weights file, read piece by piece: safetensors, or a torch `.bin`/`.pth`.

Names, shapes and dtypes come without the data; data come in pieces of a size the caller picks, so
memory stays bounded however large the file. Nothing in a file is ever executed: pickles go
through torch's restricted unpickler. Knows nothing of folders, indexes or models.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from chatbind_cli.errors import WeightsError

SAFETENSORS_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# What torch.load raises for files that are cut short, forged or not its own.
_LOAD_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    zipfile.BadZipFile,
)

# Pages of a mapped file count as memory in use until they are unmapped.
_REMAP_AFTER_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor before its data are read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.numel * self.dtype.itemsize


class TensorFile(ABC):
    """A file of named tensors.

    Attributes:
        path: where it lies.
        tensors: name -> shape and dtype, in the file's own order.
    """

    path: Path
    tensors: dict[str, TensorInfo]

    @abstractmethod
    def read_flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of a tensor in row-major order, as a fresh 1-D tensor.

        Raises:
            WeightsError: the data cannot be read.
        """

    def release(self) -> None:
        """Gives back memory and handles; the next read opens the file again."""
        return


def open_tensor_file(path: Path) -> TensorFile:
    """Opens a weights file by its content, whatever its name ends in.

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
        return SafetensorsFile(path)
    if head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return TorchFile(path)
    if head.startswith(b"version h"):
        raise WeightsError(
            "is a Git LFS pointer, not the weights",
            where=str(path),
            hint="fetch the file itself, for instance with `chatbind download`",
        )
    raise WeightsError("is neither a safetensors nor a torch file", where=str(path))


class SafetensorsFile(TensorFile):
    """Reads by offset and length, so nothing stays mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin: dict[str, int] = {}
        self.tensors = {}
        try:
            # The library checks what a forged header could lie about: offsets that overlap,
            # leave holes or reach past the end, sizes that do not fit the shapes.
            with safe_open(str(path), framework="pt"), path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightsError(
                f"not a valid safetensors file ({error})", where=str(path)
            ) from error
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
            if dtype is None:
                raise WeightsError(
                    f"tensor {name} has the unknown dtype {entry['dtype']}", where=str(path)
                )
            self.tensors[name] = TensorInfo(tuple(entry["shape"]), dtype)
            self._begin[name] = 8 + length + int(entry["data_offsets"][0])
        self.metadata: dict[str, str] = header.get("__metadata__") or {}

    def read_flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See the base class."""
        info = self.tensors[name]
        piece = torch.empty(stop - start, dtype=info.dtype)
        if piece.numel():
            buffer = piece.view(torch.uint8).numpy().data
            try:
                with self.path.open("rb", buffering=0) as file:
                    file.seek(self._begin[name] + start * info.dtype.itemsize)
                    _read_into(file, buffer, self.path)
            except OSError as error:
                raise WeightsError(f"tensor {name}: {error}", where=str(self.path)) from error
        return piece


def _read_into(file: Any, buffer: memoryview, path: Path) -> None:
    while buffer:
        n = file.readinto(buffer)
        if not n:
            raise WeightsError("ends before its last tensor", where=str(path))
        buffer = buffer[n:]


class TorchFile(TensorFile):
    """Reads what `torch.save` wrote: memory-mapped where it is a zip, else whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip = zipfile.is_zipfile(path)
        self._state: dict[str, torch.Tensor] | None = None
        self._touched = 0
        if self._zip:
            self._refuse_compressed()
        self.tensors = {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype)
            for name, tensor in self._open().items()
        }
        self.release()

    def _refuse_compressed(self) -> None:
        try:
            with zipfile.ZipFile(self.path) as archive:
                packed = [e for e in archive.infolist() if e.compress_type != zipfile.ZIP_STORED]
        except (zipfile.BadZipFile, OSError) as error:
            raise WeightsError(f"not a valid torch file ({error})", where=str(self.path)) from error
        if packed:
            raise WeightsError(
                f"record {packed[0].filename} is compressed, which torch.save never does",
                where=str(self.path),
            )

    def _open(self) -> dict[str, torch.Tensor]:
        if self._state is None:
            try:
                loaded = torch.load(
                    self.path, map_location="cpu", weights_only=True, mmap=self._zip
                )
            except pickle.UnpicklingError as error:
                raise WeightsError(
                    "holds objects other than tensors, and loading them could run code",
                    where=str(self.path),
                    hint="get the weights as safetensors from a source that you trust",
                ) from error
            except _LOAD_ERRORS as error:
                reason = str(error).strip().split("\n")[0]
                raise WeightsError(
                    f"not a valid torch file ({reason})", where=str(self.path)
                ) from error
            self._state = dict(self._named_tensors(loaded))
        return self._state

    def _named_tensors(self, loaded: object) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
            loaded = loaded["state_dict"]
        if not isinstance(loaded, Mapping):
            raise WeightsError("holds no dictionary of named tensors", where=str(self.path))
        size = self.path.stat().st_size
        for name, value in loaded.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor):
                raise WeightsError(
                    f"entry {name!r} is not a tensor but {type(value).__name__}",
                    where=str(self.path),
                )
            tensor = value.detach()
            # A stride of zero makes a small file claim any size.
            if tensor.layout != torch.strided or tensor.nbytes > size:
                raise WeightsError(
                    f"tensor {name} claims {tensor.nbytes} bytes, more than the file has",
                    where=str(self.path),
                )
            yield name, tensor

    def read_flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See the base class."""
        tensor = self._open()[name]
        piece = tensor.contiguous().view(-1)[start:stop].clone()
        self._touched += piece.nbytes
        if self._zip and self._touched >= _REMAP_AFTER_BYTES:
            self.release()
        return piece

    def release(self) -> None:
        """See the base class."""
        self._state = None
        self._touched = 0

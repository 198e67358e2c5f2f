"""What `torch.save` wrote, read without torch's unpickler: the zip format and the one before it.

The pickle inside is read by an unpickler that knows the few words of which a state dict consists
and makes descriptions of tensors from them: names, shapes, and where in the file the data lie.
Anything else is refused by its name; nothing of torch or of anybody else is called, and no data
are loaded, so a file of the old format takes no more memory than any other.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from chatbind_cli.errors import WeightsError
from chatbind_cli.weights.tensor_file import TensorFile, TensorInfo

# What files that are cut short, forged or not torch's own lead to.
_LOAD_ERRORS = (
    pickle.UnpicklingError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
)
_OLD_MAGIC = 0x1950A86A20F9469CFC6C
_OLD_VERSION = 1001
# An unpickler makes room for the highest of these numbers, whether or not they are in use.
_MOST_MEMOS = 10_000_000
_LOCAL_HEADER = struct.Struct("<26xHH")

_STORAGES: Mapping[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


class _ForeignObject(Exception):
    """The pickle asks for something that no state dict consists of."""


@dataclass
class _Storage:
    """A stretch of numbers in the file; `shift` is where a view on a larger one begins."""

    key: str
    dtype: torch.dtype
    numel: int
    shift: int = 0


@dataclass
class _View:
    """A tensor over a storage: first element, sizes and strides in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class _Word:
    """What a name in a pickle stands for here: it can be called, and not be changed."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


class _Table(dict[Any, Any]):
    """An OrderedDict of the pickle; a class of its own, since state dicts hang `_metadata` on."""


class _Reader(pickle.Unpickler):
    """Makes `_View` out of tensors, and containers; refuses all else."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The few names that a state dict is made of."""
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        found = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        if isinstance(found, torch.dtype):
            return found
        function = _WORDS.get((module, name))
        if function is None:
            raise _ForeignObject(f"{module}.{name}")
        return _Word(function)

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage: `("storage", kind, key, device, numel)`, and in the old format a view."""
        kind, dtype, key, _, numel, *rest = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise ValueError("an unknown kind of storage")
        whole = self.storages.setdefault(key, _Storage(key, dtype, int(numel)))
        if rest and rest[0] is not None:
            _, offset, size = rest[0]
            return _Storage(key, dtype, int(size), int(offset))
        return whole


def _tensor(
    storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any, dtype: Any = None
) -> _View:
    if not isinstance(storage, _Storage):
        raise TypeError("a tensor without a storage")
    sizes, steps = tuple(map(int, shape)), tuple(map(int, strides))
    if len(sizes) != len(steps) or min((0, int(offset), *sizes, *steps)) < 0:
        raise ValueError("a tensor with an impossible shape")
    return _View(storage, int(offset), sizes, steps, dtype or storage.dtype)


def _tensor_with_dtype(
    storage: _Storage, offset: int, shape: Any, strides: Any, _: Any, __: Any, dtype: Any, *___: Any
) -> _View:
    return _tensor(storage, offset, shape, strides, dtype=dtype)


def _first(data: Any, *_: Any) -> Any:
    return data


def _of_type(function: Any, _: Any, args: Any, *__: Any) -> Any:
    if not isinstance(function, _Word):
        raise TypeError("a tensor that is made by no known word")
    return function(*args)


_WORDS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _Table,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_with_dtype,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    ("torch", "Size"): tuple,
    # Only ever named as the type that `_rebuild_from_type_v2` is to give.
    ("torch", "Tensor"): _first,
    ("torch.nn.parameter", "Parameter"): _first,
}


class TorchFile(TensorFile):
    """A state dict that `torch.save` wrote, of either format."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                zipped = file.read(2) == b"PK"
                file.seek(0)
                loaded, places = _read_zip(file) if zipped else _read_old(file)
                size = path.stat().st_size
        except _ForeignObject as error:
            raise WeightsError(
                f"holds {error}, which is no tensor, and loading it could run code",
                where=str(path),
                hint="get the weights as safetensors from a source that you trust",
            ) from error
        except _LOAD_ERRORS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise WeightsError(f"not a valid torch file ({reason})", where=str(path)) from error
        tensors: dict[str, TensorInfo] = {}
        begin: dict[str, int] = {}
        strides: dict[str, tuple[int, ...]] = {}
        for name, view in _named_views(loaded, path):
            info = TensorInfo(view.shape, view.dtype)
            begin[name] = _begin(name, info, view, places, size, path)
            tensors[name] = info
            if info.numel and not _in_row_major_order(view):
                strides[name] = view.strides
        super().__init__(path, tensors, begin, strides)


def _unpickle(file: IO[bytes]) -> tuple[Any, dict[str, _Storage]]:
    """The next pickle of a file, and the storages that it names."""
    start = file.tell()
    for opcode, argument, _ in pickletools.genops(file):
        if "PUT" in opcode.name and int(argument or 0) > _MOST_MEMOS:
            raise ValueError("a pickle that asks for too much memory")
    file.seek(start)
    reader = _Reader(file)
    return reader.load(), reader.storages


def _read_zip(file: IO[bytes]) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The content of a zip-format file, and where each storage lies: first byte and length."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        for entry in entries.values():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"record {entry.filename} is compressed, as torch never does it")
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it has no data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in entries and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        loaded, storages = _unpickle(io.BytesIO(archive.read(pickles[0])))
    places = {}
    for key in storages:
        entry = entries[f"{folder}data/{key}"]
        file.seek(entry.header_offset)
        name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        begin = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        places[key] = (begin, entry.file_size)
    return loaded, places


def _read_old(file: IO[bytes]) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The same for the format before: five pickles, then the storages one after another."""
    if (_unpickle(file)[0], _unpickle(file)[0]) != (_OLD_MAGIC, _OLD_VERSION):
        raise ValueError("a pickle, but not one of torch.save")
    if not _unpickle(file)[0].get("little_endian", True):
        raise ValueError("its numbers are big-endian")
    loaded, storages = _unpickle(file)
    places = {}
    for key in _unpickle(file)[0]:
        storage = storages[key]
        numel = int.from_bytes(file.read(8), "little")
        if numel != storage.numel:
            raise ValueError("its storages are not as long as it says")
        places[key] = (file.tell(), numel * storage.dtype.itemsize)
        file.seek(numel * storage.dtype.itemsize, io.SEEK_CUR)
    return loaded, places


def _named_views(loaded: object, path: Path) -> Iterator[tuple[str, _View]]:
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise WeightsError("holds no dictionary of named tensors", where=str(path))
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, _View):
            kind = type(value).__name__
            raise WeightsError(f"entry {name!r} is not a tensor but {kind}", where=str(path))
        yield name, value


def _begin(
    name: str,
    info: TensorInfo,
    view: _View,
    places: Mapping[str, tuple[int, int]],
    size: int,
    path: Path,
) -> int:
    """Where a tensor's first element lies; looks whether all of it lies in its storage."""
    if info.nbytes > size:  # a stride of zero makes a small file claim any size
        raise WeightsError(
            f"tensor {name} claims {info.nbytes} bytes, more than the file has", where=str(path)
        )
    first, length = places.get(view.storage.key, (0, 0))
    first += view.storage.shift * view.storage.dtype.itemsize + view.offset * info.dtype.itemsize
    steps = ((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))
    last = first + (1 + sum(steps)) * info.dtype.itemsize
    begin, _ = places.get(view.storage.key, (0, 0))
    if info.numel and last > min(begin + length, size):
        raise WeightsError(f"tensor {name} reaches past the end of its data", where=str(path))
    return first


def _in_row_major_order(view: _View) -> bool:
    expected = 1
    for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True

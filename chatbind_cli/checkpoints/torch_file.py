"""What `torch.save` wrote, the zip format and the one before it, read without its data.

A pickle may call anything. This one is read for what a state dict consists of, and becomes names,
shapes and places in the file; whatever else it asks for is refused by its name.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import torch

from chatbind_cli.checkpoints.safetensors_file import TensorFile, TensorInfo
from chatbind_cli.errors import WeightsError, reason

_OLD_MAGIC = 0x1950A86A20F9469CFC6C
_OLD_VERSION = 1001
_MOST_PICKLE = 8 << 20  # bytes; a thousand tensors take a fifth of a megabyte
_MOST_AXES = 64
_MOST_ARGUMENTS = 16
_MOST_ALIASES = 4  # tensors over the same numbers: tied embeddings
_ALIASES_FREE = 64 << 20
_LOCAL_HEADER = struct.Struct("<26xHH")

_OPERATIONS = (
    "PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET "
    "NONE NEWTRUE NEWFALSE FLOAT BINFLOAT INT BININT BININT1 BININT2 LONG LONG1 LONG4 "
    "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE BINUNICODE8 SHORT_BINUNICODE "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT "
    "GLOBAL STACK_GLOBAL BINPERSID"
)

# Of each storage, its first byte in the file and its length in bytes.
_Places = dict[str, tuple[int, int]]


class _ForeignObject(Exception):
    """The pickle asks for something that no state dict consists of."""


@dataclass(frozen=True)
class _Storage:
    """A stretch of numbers in the file."""

    key: str
    dtype: torch.dtype


@dataclass(frozen=True)
class _View:
    """A tensor over a storage: first element, sizes and strides in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def open_torch(path: Path) -> TensorFile:
    """Looks into a file of torch's that holds a state dict.

    Raises:
        WeightsError: the file is broken or cut short, or holds anything but named tensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
            file.seek(0)
            loaded, places = _read_zip(file) if zipped else _read_old(file)
        tensors = {
            name: _located(name, view, places, size) for name, view in _named(loaded).items()
        }
        if sum(info.nbytes for info in tensors.values()) > _MOST_ALIASES * size + _ALIASES_FREE:
            raise ValueError("its tensors share their numbers many times over")
    except _ForeignObject as error:
        raise WeightsError(
            f"holds {error}, which is no tensor, and loading it could run code",
            where=str(path),
            hint="get the weights as safetensors from a source that you trust",
        ) from error
    except Exception as error:  # forged files fail in more ways than there are names for
        raise WeightsError(f"not a valid torch file ({reason(error)})", where=str(path)) from error
    return TensorFile(path, tensors)


def _read_zip(file: IO[bytes]) -> tuple[Any, _Places]:
    """The content of a zip-format file, and where each storage lies."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        for entry in entries.values():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"record {entry.filename} is compressed, as torch never does it")
        if len(entries) != len(archive.infolist()):
            raise ValueError("two of its records have the same name")
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it has no data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        # torch takes the folder of the first record, whichever has a data.pkl
        if any(not name.startswith(folder) for name in entries):
            raise ValueError("its records lie in several folders")
        order = f"{folder}byteorder"
        if order in entries and archive.open(order).read(_MOST_PICKLE) != b"little":
            raise ValueError("its numbers are big-endian")
        loaded, storages = _unpickle(io.BytesIO(archive.open(pickles[0]).read(_MOST_PICKLE)))
    places = {}
    for key in storages:
        entry = entries[f"{folder}data/{key}"]
        file.seek(entry.header_offset)
        name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        begin = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        places[key] = (begin, entry.file_size)
    return loaded, places


def _read_old(file: IO[bytes]) -> tuple[Any, _Places]:
    """The same for the format before: five pickles, then the storages one after another."""
    magic, version, machine = (_unpickle(file)[0] for _ in range(3))
    if (magic, version) != (_OLD_MAGIC, _OLD_VERSION):
        raise ValueError("a pickle, but not one of torch.save")
    if not machine.get("little_endian", True):
        raise ValueError("its numbers are big-endian")
    loaded, storages = _unpickle(file)
    places = {}
    for key in _unpickle(file)[0]:
        if not isinstance(key, str):
            raise TypeError("a storage without a name")
        length = int.from_bytes(file.read(8), "little") * storages[key].dtype.itemsize
        places[key] = (file.tell(), length)
        file.seek(length, io.SEEK_CUR)
    return loaded, places


def _unpickle(file: IO[bytes]) -> tuple[Any, dict[str, _Storage]]:
    """The next pickle of a file, and the storages that it names."""
    start = file.tell()
    # apart from the numbers that follow it, so that no string in it can be as long as the file
    pickled = io.BytesIO(file.read(_MOST_PICKLE))
    reader = _StateUnpickler(pickled)
    loaded = reader.load()
    file.seek(start + pickled.tell())
    return loaded, reader.storages


class _StateUnpickler(pickle._Unpickler):
    """Python's own, with the few operations and the few names of which a state dict consists.

    What takes a key is written anew: to hash what a forged file nests a million deep is a crash.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The few names that a state dict is made of."""
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        found = vars(torch).get(name) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        if (module, name) not in _FUNCTIONS:
            raise _ForeignObject(ascii(f"{module}.{name}"[:100])[1:-1])
        return _FUNCTIONS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage: `("storage", dtype, key, device, numel)`, and in the old format a view."""
        kind, dtype, key, _device, _numel, *view = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise ValueError("an unknown kind of storage")
        if view not in ([], [None]):
            raise ValueError("a part of a storage, which is not read")
        return self.storages.setdefault(key, _Storage(key, dtype))

    def _update(self, items: list[Any]) -> None:
        table = self.stack[-1]
        if not isinstance(table, dict):
            raise TypeError("entries for what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # the hash of a long number takes as long as its digits, each time
            if not isinstance(key, str) and not (isinstance(key, int) and key.bit_length() < 64):
                raise TypeError(f"a key that is a {type(key).__name__}")
            table[key] = value

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _set_items(self) -> None:
        self._update(self.pop_mark())

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(_call(function, arguments))

    def _build(self) -> None:
        """A state dict's `_metadata` and the like: nothing that its tensors need."""
        self.stack.pop()

    # Where the base class looks operations up, by their codes.
    dispatch: ClassVar[dict[int, Any]] = {
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.REDUCE[0]: _reduce,
        pickle.BUILD[0]: _build,
    }
    for _name in _OPERATIONS.split():
        _code = getattr(pickle, _name)[0]
        dispatch[_code] = pickle._Unpickler.dispatch[_code]


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *_: Any, dtype: torch.dtype | None = None
) -> _View:
    if not isinstance(storage, _Storage):
        raise TypeError("a tensor without a storage")
    sound = len(shape) == len(strides) <= _MOST_AXES and all(
        isinstance(number, int) and 0 <= number < 1 << 63 for number in (offset, *shape, *strides)
    )
    if not sound:
        raise ValueError("a tensor with an impossible shape")
    return _View(storage, offset, tuple(shape), tuple(strides), dtype or storage.dtype)


def _tensor_with_dtype(*args: Any) -> _View:
    return _tensor(*args[:4], dtype=args[6])


def _first(data: Any, *_: Any) -> Any:
    return data


def _of_type(function: Any, _: Any, arguments: Any, *__: Any) -> Any:
    return _call(function, arguments)


def _call(function: Any, arguments: Any) -> Any:
    """Calls one of `_FUNCTIONS`, with few arguments: a forged file repeats calls without end."""
    if function not in _FUNCTIONS.values():
        raise TypeError("a call of what is no function")
    if not isinstance(arguments, tuple) or len(arguments) > _MOST_ARGUMENTS:
        raise TypeError("a call that no state dict makes")
    return function(*arguments)


_FUNCTIONS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): lambda: {},
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_with_dtype,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    ("torch", "Size"): _first,
    # Only ever named as the type that `_rebuild_from_type_v2` is to give.
    ("torch", "Tensor"): _first,
    ("torch.nn.parameter", "Parameter"): _first,
}

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


def _named(loaded: Any) -> Mapping[str, _View]:
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise TypeError("it holds no dictionary of named tensors")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, _View):
            raise TypeError(f"entry {name!r:.100} is not a tensor but {type(value).__name__}")
    return loaded


def _located(name: str, view: _View, places: _Places, size: int) -> TensorInfo:
    """The tensor with its place, once all of it lies in its storage, and that in the file."""
    info = TensorInfo(view.shape, view.dtype)
    if info.nbytes > size:  # a stride of zero makes a small file claim any size
        raise ValueError(f"tensor {name} claims more bytes than the file has")
    if not info.nbytes:
        return info
    begin, length = places[view.storage.key]
    first = begin + view.offset * view.dtype.itemsize
    steps = [(n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True)]
    last = first + (1 + sum(steps)) * view.dtype.itemsize
    if last > min(begin + length, size):
        raise ValueError(f"tensor {name} reaches past the end of its data")
    return TensorInfo(view.shape, view.dtype, first, None if _row_major(view) else view.strides)


def _row_major(view: _View) -> bool:
    expected = 1
    for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True

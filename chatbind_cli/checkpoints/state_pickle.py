"""The pickle of a state dict, read without calling anything that it names.

Makes descriptions of tensors: names, shapes, and where in which storage the data lie. Whatever else
a pickle asks for is refused by its name. Knows nothing of files.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch

_MOST_STEPS = 600_000  # about thirty a tensor
_MOST_BITS = 80
_MOST_AXES = 64

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


class ForeignObject(Exception):
    """The pickle asks for something that no state dict consists of."""


@dataclass
class Storage:
    """A stretch of numbers in the file; `shift` is where a view on a larger one begins."""

    key: str
    dtype: torch.dtype
    numel: int
    shift: int = 0


@dataclass
class View:
    """A tensor over a storage: first element, sizes and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of its elements in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def span(self) -> int:
        """How many elements of the storage lie between its first and its last one, both counted."""
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))

    @property
    def is_row_major(self) -> bool:
        """Whether its elements lie side by side in row-major order."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


@dataclass(frozen=True, slots=True)
class _Word:
    """What a name in a pickle stands for here."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class PickleReader:
    """The stack machine of a pickle, for the few operations of which a state dict consists.

    Python's own would call what it finds, hash what a forged file nests two million deep (a crash),
    and set attributes on what this module has made. Here containers hold what they are given, keys
    are strings or numbers, and what a state dict has no use for is refused.
    """

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self, file: IO[bytes]) -> Any:
        """The object of the next pickle in a file."""
        for steps, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if steps > _MOST_STEPS:
                raise ValueError("a pickle of more steps than any state dict")
            self._step(opcode.name, argument)
        return self._stack.pop()

    def _step(self, name: str, argument: Any) -> None:
        if name in _VALUES:
            if isinstance(argument, int) and abs(argument) >> _MOST_BITS:
                raise ValueError("a number that is too large")
            self._stack.append(argument)
        elif name in _MAKERS:
            self._stack.append(_MAKERS[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE", "PUT"):
            self._memo[len(self._memo) if argument is None else int(argument)] = self._stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self._stack.append(self._memo[int(argument)])
        elif name == "MARK":
            self._marks.append(len(self._stack))
        elif name in _IGNORED:
            pass
        else:
            operation = getattr(self, f"_{name.lower()}", None)
            if operation is None:
                raise ValueError(f"the operation {name}, of which no state dict consists")
            operation(argument)

    def _take(self, count: int) -> list[Any]:
        floor = self._marks[-1] if self._marks else 0
        if len(self._stack) - count < floor:
            raise ValueError("a pickle that takes more than it has")
        return [self._stack.pop() for _ in range(count)][::-1]

    def _take_to_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._take_to_mark()))

    def _tuple1(self, _: Any) -> None:
        self._stack.append(tuple(self._take(1)))

    def _tuple2(self, _: Any) -> None:
        self._stack.append(tuple(self._take(2)))

    def _tuple3(self, _: Any) -> None:
        self._stack.append(tuple(self._take(3)))

    def _append(self, _: Any) -> None:
        self._extend(self._take(1))

    def _appends(self, _: Any) -> None:
        self._extend(self._take_to_mark())

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise TypeError("items for what is no list")
        self._stack[-1].extend(items)

    def _setitem(self, _: Any) -> None:
        self._update(self._take(2))

    def _setitems(self, _: Any) -> None:
        self._update(self._take_to_mark())

    def _update(self, items: list[Any]) -> None:
        table = self._stack[-1]
        if not isinstance(table, dict):
            raise TypeError("entries for what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int)):
                raise TypeError(f"a key that is a {type(key).__name__}")
            table[key] = value

    def _build(self, _: Any) -> None:
        """A state dict's `_metadata` and the like: nothing that its tensors need."""
        self._take(1)

    def _global(self, argument: str) -> None:
        self._stack.append(_word(*argument.split(" ", 1)))

    def _stack_global(self, _: Any) -> None:
        module, name = self._take(2)
        self._stack.append(_word(str(module), str(name)))

    def _reduce(self, _: Any) -> None:
        function, arguments = self._take(2)
        if not isinstance(function, _Word) or not isinstance(arguments, tuple):
            raise TypeError("a call of what is no function")
        self._stack.append(function(*arguments))

    def _binpersid(self, _: Any) -> None:
        """A storage: `("storage", kind, key, device, numel)`, and in the old format a view."""
        kind, dtype, key, _device, numel, *rest = self._take(1)[0]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise ValueError("an unknown kind of storage")
        storage = self.storages.setdefault(key, Storage(key, dtype, int(numel)))
        if rest and rest[0] is not None:
            _, offset, size = rest[0]
            storage = Storage(key, dtype, int(size), int(offset))
        self._stack.append(storage)


def _word(module: str, name: str) -> Any:
    """The few names that a state dict is made of."""
    if module in ("torch", "torch.storage") and name in _STORAGES:
        return _STORAGES[name]
    found = vars(torch).get(name) if module == "torch" else None
    if isinstance(found, torch.dtype):
        return found
    function = _WORDS.get((module, name))
    if function is None:
        raise ForeignObject(ascii(f"{module}.{name}"[:100])[1:-1])
    return _Word(function)


def _tensor(
    storage: Storage, offset: int, shape: Any, strides: Any, *_: Any, dtype: Any = None
) -> View:
    if not isinstance(storage, Storage):
        raise TypeError("a tensor without a storage")
    sizes, steps = tuple(map(int, shape)), tuple(map(int, strides))
    if (
        len(sizes) > _MOST_AXES
        or len(sizes) != len(steps)
        or min((0, int(offset), *sizes, *steps)) < 0
    ):
        raise ValueError("a tensor with an impossible shape")
    return View(storage, int(offset), sizes, steps, dtype or storage.dtype)


def _tensor_with_dtype(
    storage: Storage, offset: int, shape: Any, strides: Any, _: Any, __: Any, dtype: Any, *___: Any
) -> View:
    return _tensor(storage, offset, shape, strides, dtype=dtype)


def _first(data: Any, *_: Any) -> Any:
    return data


def _of_type(function: Any, _: Any, args: Any, *__: Any) -> Any:
    if not isinstance(function, _Word):
        raise TypeError("a tensor that is made by no known word")
    return function(*args)


# What an operation with an argument leaves on the stack: the argument.
_VALUES = frozenset(
    {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING"}
    | {"UNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE"}
)
_MAKERS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_IGNORED = frozenset(("PROTO", "FRAME", "STOP"))

_WORDS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): dict,
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

"""What `torch.save` wrote, read without torch's unpickler: the zip format and the one before it.

No data are loaded, so a file of the old format takes no more memory than any other. What the pickle
inside may hold is known to `state_pickle`.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from chatbind_cli.checkpoints.state_pickle import ForeignObject, PickleReader, Storage, View
from chatbind_cli.errors import WeightsError, reason

_OLD_MAGIC = 0x1950A86A20F9469CFC6C
_OLD_VERSION = 1001
_MOST_PICKLE = 64 << 20  # bytes
_MOST_ALIASES = 4  # tensors over the same numbers: tied embeddings
_ALIASES_FREE = 64 << 20
_LOCAL_HEADER = struct.Struct("<26xHH")


def read_torch(path: Path) -> dict[str, tuple[View, int]]:
    """The tensors of a state dict, each with the position of its first element in the file.

    Raises:
        WeightsError: the file is broken or cut short, or holds anything but named tensors.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
            file.seek(0)
            loaded, places = _read_zip(file) if zipped else _read_old(file)
            size = path.stat().st_size
    except ForeignObject as error:
        raise WeightsError(
            f"holds {error}, which is no tensor, and loading it could run code",
            where=str(path),
            hint="get the weights as safetensors from a source that you trust",
        ) from error
    except Exception as error:  # forged files fail in more ways than there are names for
        raise WeightsError(f"not a valid torch file ({reason(error)})", where=str(path)) from error
    views = dict(_named_views(loaded, path))
    begin = {name: _begin(name, view, places, size, path) for name, view in views.items()}
    if sum(view.nbytes for view in views.values()) > _MOST_ALIASES * size + _ALIASES_FREE:
        raise WeightsError("its tensors share their numbers many times over", where=str(path))
    return {name: (view, begin[name]) for name, view in views.items()}


def _unpickle(file: IO[bytes]) -> tuple[Any, dict[str, Storage]]:
    """The next pickle of a file, and the storages that it names."""
    start = file.tell()
    # apart from the numbers that follow it, so that no string in it can be as long as the file
    pickled = io.BytesIO(file.read(_MOST_PICKLE))
    reader = PickleReader()
    loaded = reader.load(pickled)
    file.seek(start + pickled.tell())
    return loaded, reader.storages


def _read_zip(file: IO[bytes]) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The content of a zip-format file, and where each storage lies: first byte and length."""
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


def _read_old(file: IO[bytes]) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The same for the format before: five pickles, then the storages one after another."""
    if (_unpickle(file)[0], _unpickle(file)[0]) != (_OLD_MAGIC, _OLD_VERSION):
        raise ValueError("a pickle, but not one of torch.save")
    if not _unpickle(file)[0].get("little_endian", True):
        raise ValueError("its numbers are big-endian")
    loaded, storages = _unpickle(file)
    places = {}
    for key in _unpickle(file)[0]:
        if not isinstance(key, str):
            raise TypeError("a storage without a name")
        storage = storages[key]
        numel = int.from_bytes(file.read(8), "little")
        if numel != storage.numel:
            raise ValueError("its storages are not as long as it says")
        places[key] = (file.tell(), numel * storage.dtype.itemsize)
        file.seek(numel * storage.dtype.itemsize, io.SEEK_CUR)
    return loaded, places


def _named_views(loaded: object, path: Path) -> Iterator[tuple[str, View]]:
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise WeightsError("holds no dictionary of named tensors", where=str(path))
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, View):
            kind = type(value).__name__
            raise WeightsError(f"entry {name!r} is not a tensor but {kind}", where=str(path))
        yield name, value


def _begin(
    name: str, view: View, places: Mapping[str, tuple[int, int]], size: int, path: Path
) -> int:
    """Where a tensor's first element lies; looks whether all of it lies in its storage."""
    if view.nbytes > size:  # a stride of zero makes a small file claim any size
        raise WeightsError(f"tensor {name} claims more bytes than the file has", where=str(path))
    begin, length = places.get(view.storage.key, (0, 0))
    first = begin + view.storage.shift * view.storage.dtype.itemsize
    first += view.offset * view.dtype.itemsize
    last = first + view.span * view.dtype.itemsize
    if view.nbytes and (first < begin or last > min(begin + length, size)):
        raise WeightsError(f"tensor {name} reaches past the end of its data", where=str(path))
    return first

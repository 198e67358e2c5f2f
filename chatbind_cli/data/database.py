"""The SQLite file of an embedding store: made whole, and looked at before it is trusted.

Two tables: `embeddings`, a row a medium, and `store`, what made them (keys and JSON values). A
rollback journal undoes what a killed writer has left half done. There is no write-ahead log: it
needs memory that all readers share, and network file systems have none.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch

from chatbind_cli.errors import StoreError, reason
from chatbind_cli.files import replace_file

FILE_NAME: Final = "embeddings.sqlite"
JOURNAL_NAME: Final = f"{FILE_NAME}-journal"
DTYPES: Final = {"float16": torch.float16, "float32": torch.float32}

INSERT: Final = (
    "INSERT OR REPLACE INTO embeddings (name, modality, preprocessing, sha256, embedding) "
    "VALUES (?, ?, ?, ?, ?)"
)
_SCHEMA: Final = (
    "CREATE TABLE store (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE embeddings (id INTEGER PRIMARY KEY, name TEXT NOT NULL, modality TEXT NOT NULL, "
    "preprocessing TEXT NOT NULL, sha256 BLOB NOT NULL, embedding BLOB NOT NULL)",
    "CREATE UNIQUE INDEX by_name ON embeddings (name, modality, preprocessing)",
    "CREATE INDEX by_content ON embeddings (sha256)",
)
_PAGE_BYTES = 32768  # 15 rows of 1024 float16 numbers; of 4096 bytes a row would fill half
_LONGEST_VALUE = 64 << 20
_WIDEST = 1 << 20  # numbers of an embedding
_PATIENCE_S = 10.0  # while another process commits
_SETTINGS = (
    "trusted_schema = OFF",
    "synchronous = NORMAL",
    "cache_spill = OFF",  # a writer that wrote before it commits would keep readers out all along
)
_NAMES_OTHER_FILES = bytes.fromhex("d9d505f920a163d7")


@dataclass(frozen=True, kw_only=True)
class StoreMeta:
    """What a store says about its making.

    Attributes:
        encoder_sha256: of the encoder's weights.
        dim: length of the embeddings.
        dtype: of the embeddings' numbers, a key of `DTYPES`.
        encoder_dtype: in which the encoder worked; None where nobody has said it.
        media_options: fields of `MediaOptions` that all rows share; None likewise.
        encoders: how many made the rows, in each of which they have places side by side.

    Raises:
        ValueError: a value that no writer of ours says.
    """

    encoder_sha256: str
    dim: int
    encoder_name: str = ""
    dtype: str = "float16"
    encoder_dtype: str | None = None
    media_options: dict[str, Any] | None = None
    encoders: int = 1

    def __post_init__(self) -> None:
        for name, right in (
            ("encoder_sha256", isinstance(self.encoder_sha256, str)),
            ("dim", type(self.dim) is int and 0 < self.dim <= _WIDEST),
            ("encoder_name", isinstance(self.encoder_name, str)),
            ("dtype", isinstance(self.dtype, str) and self.dtype in DTYPES),
            ("encoder_dtype", isinstance(self.encoder_dtype, str | None)),
            ("media_options", isinstance(self.media_options, dict | None)),
            ("encoders", type(self.encoders) is int),
        ):
            if not right:
                raise ValueError(f"its {name} is {str(getattr(self, name))[:80]!r}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> StoreMeta:
        """Those among some values that are fields; None and what is not there are the defaults.

        Raises:
            ValueError: one of them is wrong.
            TypeError: one that is needed is not there.
        """
        names = {field.name for field in fields(cls)}
        return cls(**{key: values[key] for key in names & values.keys() if values[key] is not None})


def create(path: Path, meta: StoreMeta) -> None:
    """Makes the file of a new store: there is a whole one, or none.

    Raises:
        StoreError: it cannot be written.
    """
    with replace_file(path) as temporary:
        try:
            with closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
                connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
                connection.execute("PRAGMA journal_mode = OFF")
                connection.execute("BEGIN")
                for statement in _SCHEMA:
                    connection.execute(statement)
                write_meta(connection, meta)
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise unusable(path, error) from error


def connect(path: Path, *, write: bool = False) -> tuple[sqlite3.Connection, StoreMeta]:
    """Opens the file of a store, which may come from anybody, and reads what it says of itself.

    A reader, too, rolls back what a killed writer has left half done, where it may. Locks are done
    without where the file system has none.

    Raises:
        StoreError: it is broken, or no store.
    """
    _refuse_foreign_journal(path.with_name(JOURNAL_NAME))
    ways = ["mode=rw", "mode=rw&nolock=1"] if write else ["mode=ro", "mode=rw", "mode=ro&nolock=1"]
    while True:
        try:
            return _connected(f"{path.absolute().as_uri()}?{ways.pop(0)}")
        except (sqlite3.Error, ValueError, TypeError, RecursionError) as error:
            if not ways or not isinstance(error, sqlite3.OperationalError):
                raise unusable(path, error) from error


def _refuse_foreign_journal(journal: Path) -> None:
    """Refuses a journal with the name of another file: playing it back may remove that file."""
    if journal.is_file():
        with journal.open("rb") as file:
            file.seek(max(0, journal.stat().st_size - len(_NAMES_OTHER_FILES)))
            if file.read() == _NAMES_OTHER_FILES:
                raise StoreError("is no journal of ours", where=str(journal), hint="remove it")


def _connected(address: str) -> tuple[sqlite3.Connection, StoreMeta]:
    connection = sqlite3.connect(
        address, uri=True, timeout=_PATIENCE_S, isolation_level=None, check_same_thread=False
    )
    try:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_VALUE)
        for setting in _SETTINGS:
            connection.execute(f"PRAGMA {setting}")
        found = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL LIMIT 9")
        if {sql for (sql,) in found} != set(_SCHEMA):  # a view or trigger would be code of others
            raise ValueError("its tables are not those of an embedding store of this version")
        said = connection.execute("SELECT key, value FROM store LIMIT 99").fetchall()
        return connection, StoreMeta.of({key: json.loads(value) for key, value in said})
    except BaseException:
        connection.close()
        raise


def unusable(path: Path, error: Exception) -> StoreError:
    """The error of a store's file that SQLite cannot work with."""
    hint = None
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        hint = "make room and run the same command again"
    elif isinstance(error, sqlite3.OperationalError):
        hint = "another process may be writing it, or have been killed while it did: wait for it, "
        hint += "or go on with its command"
    return StoreError(f"cannot be used: {reason(error)}", where=str(path), hint=hint)


def write_meta(connection: sqlite3.Connection, meta: StoreMeta) -> None:
    """Writes what a store says about itself, in place of what it has said."""
    said = [(key, json.dumps(value)) for key, value in asdict(meta).items()]
    connection.executemany("INSERT OR REPLACE INTO store (key, value) VALUES (?, ?)", said)

"""A folder in the making that survives a kill: the same command again goes on where it stopped.

The folder has a fixed name beside its target and a progress file that says what it is the
beginning of; a beginning of something else is thrown away. One process at a time may work on it.
It carries a record (`folders`) from the start, so that a folder of somebody else's that has this
name is told from it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from chatbind_cli.errors import WeightsError
from chatbind_cli.files import replace_file
from chatbind_cli.folders import (
    RECORD,
    clear_leftovers,
    is_noted,
    note_made,
    put_folder,
    refuse_foreign,
    refuse_taken,
    remove_folder,
)

_PROGRESS = "progress.json"
_LOCK = "lock"


class PartialFolder:
    """The beginning of `target`. A context manager: leaving it by an error keeps what is done.

    Args:
        target: the folder to make.
        task: everything that the content follows from, as JSON; another task starts anew.
        made_by: the command.
        overwrite: whether a folder that this command made may be replaced.

    Attributes:
        folder: where files are written.
        done: what was recorded of each finished file.
    """

    def __init__(
        self, target: Path, task: Mapping[str, Any], *, made_by: str, overwrite: bool = False
    ) -> None:
        self.made_by = made_by
        self.target = target.resolve()  # "." has no name
        self.overwrite = overwrite
        self.folder = _partial(self.target)
        text = json.dumps(task, sort_keys=True)
        self._task = hashlib.sha256(text.encode()).hexdigest()
        self.done: dict[str, Any] = {}

    def __enter__(self) -> PartialFolder:
        """Takes the folder, with what an earlier run of the same task has left in it.

        Raises:
            ChatBindError: the target is there already, or another process works on it.
        """
        refuse_taken(self.target, made_by=self.made_by, overwrite=self.overwrite)
        if self.folder.is_symlink():
            raise WeightsError("is a link", where=str(self.folder), hint="remove it")
        if not is_noted(self.folder, RECORD):
            refuse_foreign(self.folder, made_by=self.made_by)
        clear_leftovers(self.target)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise WeightsError(
                "another process is making it", where=str(self.target), hint="wait for it"
            ) from error
        self._take_up()
        return self

    def _take_up(self) -> None:
        try:
            progress = json.loads((self.folder / _PROGRESS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            progress = {}
        if progress.get("task") == self._task:
            self.done = progress["done"]
        for child in self.folder.iterdir():
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            elif child.name not in (_LOCK, _PROGRESS, RECORD, *self.done):
                child.unlink()
        note_made(self.folder, (), made_by=self.made_by)

    def record(self, file: str, facts: Mapping[str, Any]) -> None:
        """Remembers that a file of the folder is whole."""
        self.done[file] = dict(facts)
        text = json.dumps({"task": self._task, "done": self.done})
        with replace_file(self.folder / _PROGRESS) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def commit(self) -> None:
        """Gives the folder its name."""
        refuse_foreign(self.target, made_by=self.made_by)
        (self.folder / _PROGRESS).unlink(missing_ok=True)
        put_folder(self.folder, self.target, made_by=self.made_by)
        (self.target / _LOCK).unlink()

    def discard(self) -> None:
        """Throws away what is done: it cannot become the target."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Lets the next process in."""
        os.close(self._lock)


def clear_replaced(target: Path) -> None:
    """Removes what a run left that was killed when it had put a finished folder in its place."""
    target = target.resolve()
    clear_leftovers(target)
    # one in the making has a lock
    if not (_partial(target) / _LOCK).exists():
        remove_folder(_partial(target))
        if (target / _LOCK).is_file() and (target / _LOCK).stat().st_size == 0:
            (target / _LOCK).unlink()


def _partial(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"

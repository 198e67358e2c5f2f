"""A folder in the making that survives a kill: the same command again goes on where it stopped.

The folder has a fixed name beside its target and a progress file that says what it is the
beginning of; a beginning of something else is thrown away. One process at a time may work on it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from chatbind_cli.errors import WeightsError
from chatbind_cli.files import replace_file

_PROGRESS = "progress.json"
_LOCK = "lock"


class PartialFolder:
    """The beginning of `target`. A context manager: leaving it by an error keeps what is done.

    Args:
        target: the folder to make.
        task: everything that the content follows from, as JSON; another task starts anew.
        overwrite: whether a folder that is there may be replaced.

    Attributes:
        folder: where files are written.
        done: what was recorded of each finished file.
    """

    def __init__(self, target: Path, task: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.target = target.resolve()  # "." has no name
        self.overwrite = overwrite
        self.folder = self.target.parent / f".{self.target.name}.partial"
        text = json.dumps(task, sort_keys=True)
        self._task = hashlib.sha256(text.encode()).hexdigest()
        self.done: dict[str, Any] = {}

    def __enter__(self) -> PartialFolder:
        """Takes the folder, with what an earlier run of the same task has left in it.

        Raises:
            WeightsError: the target is there already, or another process works on it.
        """
        refuse_existing(self.target, overwrite=self.overwrite)
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
            if child.name not in (_LOCK, _PROGRESS, *self.done):
                child.unlink()

    def record(self, file: str, facts: Mapping[str, Any]) -> None:
        """Remembers that a file of the folder is whole."""
        self.done[file] = dict(facts)
        text = json.dumps({"task": self._task, "done": self.done})
        with replace_file(self.folder / _PROGRESS) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def commit(self) -> None:
        """Gives the folder its name."""
        for name in (_PROGRESS, _LOCK):
            (self.folder / name).unlink(missing_ok=True)
        old: Path | None = None
        if self.target.exists():
            old = Path(tempfile.mkdtemp(dir=self.target.parent, prefix=f".{self.target.name}."))
            self.target.replace(old / "was")
        self.folder.replace(self.target)
        if old is not None:
            shutil.rmtree(old)

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


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Refuses to write over what is there.

    Raises:
        WeightsError: the target is a file, the working folder, or a folder that is not empty
            without `overwrite`.
    """
    if target.is_file():
        raise WeightsError("is a file", where=str(target), hint="name a folder")
    if target.resolve() == Path.cwd():
        raise WeightsError(
            "is the folder that this runs in, and the finished one takes its place",
            where=str(target),
            hint="name a folder in it",
        )
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise WeightsError(
            "exists already and is not empty",
            where=str(target),
            hint="choose another folder, or say --overwrite",
        )

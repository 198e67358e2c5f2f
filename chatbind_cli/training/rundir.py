"""A training run's folder: whose it is, how far it came, and which checkpoints are whole.

`run.json` says which arguments made the folder and whether the run is finished; `checkpoint-N`
folders appear under that name only when they are complete; `log.jsonl` has one line a logged step.
Knows nothing of what is in a checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from chatbind_cli.errors import ChatBindError, CheckpointError
from chatbind_cli.files import replace_file
from chatbind_cli.jsonl import Record, dumps
from chatbind_cli.numerals import whole_number

RUN_FILE: Final = "run.json"
LOG_FILE: Final = "log.jsonl"
EMBEDDINGS: Final = "embeddings"
STAGING: Final = ".saving"  # checkpoints grow here, under no name that a resuming run looks at
REJECTED_FILE: Final = "rejected.jsonl"
_MANIFEST: Final = "manifest.json"
_LOCK: Final = ".lock"
_PREFIX: Final = "checkpoint-"
_FORMAT: Final = 1


@dataclass(frozen=True)
class RunFolder:
    """The folder of one training run."""

    path: Path

    def finished_artifact(self) -> Record | None:
        """The artefact record of a finished run, or None."""
        run = self._read()
        return run["artifact"] if run and run.get("status") == "finished" else None

    def claim(self, identity: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Makes the folder this run's own, or finds that it is already.

        Raises:
            CheckpointError: the folder holds something else, or a run with other arguments.
        """
        run = self._read()
        if overwrite:
            self._wipe()
            run = None
        elif run is not None:
            self._compare(run.get("identity", {}), identity)
            return
        elif self.path.exists() and any(c.name != _LOCK for c in self.path.iterdir()):
            raise CheckpointError(
                "is not empty, and not the folder of a training run",
                where=str(self.path),
                hint="choose another --output-dir",
            )
        self._write({"status": "running", "identity": dict(identity)})

    def confirm(self, found: Mapping[str, Any]) -> None:
        """Compares what this run has found in its inputs with what the folder's run had found.

        Args:
            found: hashes of what the arguments only name.

        Raises:
            CheckpointError: a file that the arguments name has changed since.
        """
        run = self._read() or {}
        had = run.get("found")
        if had is not None:
            self._compare(had, found)
        else:
            self._write({**run, "found": dict(found)})

    def publish_files(self, staged: Path, last: str) -> None:
        """Moves finished files into the folder, the one that makes them count at the end.

        Args:
            staged: where they were written, on the same file system.
            last: the name of that one.
        """
        files = sorted(staged.iterdir(), key=lambda file: (file.name == last, file.name))
        run = self._read() or {}
        self._write({**run, "files": [file.name for file in files]})
        mask = os.umask(0)
        os.umask(mask)
        for file in files:
            file.chmod(0o666 & ~mask)  # some libraries keep what they write from other users
            sync(file)
            file.replace(self.path / file.name)
        sync(self.path)

    def finish(self, artifact: Record, more: Mapping[str, Any]) -> None:
        """Notes that the run is done, and what it made."""
        run = self._read() or {}
        self._write({**run, **more, "status": "finished", "artifact": artifact})

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        for folder in reversed(self.checkpoints()):
            if is_complete(folder):
                return folder
        return None

    def checkpoints(self) -> list[Path]:
        """All checkpoints, oldest first."""
        found = [
            (step, folder)
            for folder in self.path.glob(f"{_PREFIX}*")
            if (step := whole_number(folder.name.removeprefix(_PREFIX))) is not None
            and folder.is_dir()
        ]
        return [folder for _, folder in sorted(found)]

    def publish_checkpoint(self, staged: Path, keep: int | None) -> Path:
        """Gives a staged checkpoint its name, and removes old ones.

        Args:
            staged: the folder under `STAGING`.
            keep: how many checkpoints stay; None for all.
        """
        seal(staged)
        final = self.path / staged.name
        if final.exists():
            # left by a run that was killed, and found incomplete by this one
            shutil.rmtree(final)
        staged.replace(final)
        sync(self.path)
        if keep is not None:
            for old in self.checkpoints()[: -max(1, keep)]:
                shutil.rmtree(old)
        return final

    def clear_staging(self) -> None:
        """Removes what a killed run left half done."""
        shutil.rmtree(self.path / STAGING, ignore_errors=True)
        for left in [*self.path.glob(".*.tmp"), *self.path.glob(".*.old")]:
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)

    def cut_log(self, step: int) -> None:
        """Leaves only the lines up to `step` in the log: the steps after it are done again."""
        path = self.path / LOG_FILE
        if not path.exists():
            return
        kept = [record for record in read_log(path) if record["step"] <= step]
        with replace_file(path) as temporary:
            temporary.write_text("".join(dumps(r) + "\n" for r in kept), encoding="utf-8")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second run out of the folder; a killed run's lock goes with its process.

        Raises:
            ChatBindError: another run is at work in the folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / _LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ChatBindError(
                    "another run is at work in this folder",
                    where=str(self.path),
                    hint="wait for it, or end it",
                ) from error
            except OSError:
                # some network file systems have no locks; training can do without one
                yield
                return
            yield

    def _read(self) -> dict[str, Any] | None:
        path = self.path / RUN_FILE
        if not path.exists():
            return None
        try:
            run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError("is not JSON", where=str(path), hint="--overwrite") from error
        return run

    def _write(self, run: Mapping[str, Any]) -> None:
        with replace_file(self.path / RUN_FILE) as temporary:
            temporary.write_text(
                json.dumps({"format": _FORMAT, **run}, indent=2, ensure_ascii=False) + "\n",
                encoding="utf-8",
            )

    def _compare(self, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        # through JSON, so that a tuple equals the list that it was written as
        plain = json.loads(json.dumps(dict(ours)))
        for key in sorted({*theirs, *plain}):
            if theirs.get(key) != plain.get(key):
                raise CheckpointError(
                    f"holds a run with {key.replace('_', '-')} {_shown(theirs.get(key))}, and "
                    f"this one has {_shown(plain.get(key))}",
                    where=str(self.path),
                    hint="choose another --output-dir, or say --overwrite",
                )

    def _wipe(self) -> None:
        """Removes what runs make, `run.json` last: a kill in the middle leaves it recognizable."""
        self.clear_staging()
        names = [EMBEDDINGS, LOG_FILE, REJECTED_FILE]
        for path in [*self.checkpoints(), *(self.path / name for name in names)]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        run = self._read() if (self.path / RUN_FILE).exists() else None
        for name in (run or {}).get("files", []):
            (self.path / Path(name).name).unlink(missing_ok=True)
        (self.path / RUN_FILE).unlink(missing_ok=True)


def seal(folder: Path) -> None:
    """Writes the list of a checkpoint's files, after all of them have reached the disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _MANIFEST)
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in files}
    for path in files:
        sync(path)
    with replace_file(folder / _MANIFEST) as temporary:
        temporary.write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint has all its files, in their full length."""
    try:
        sizes = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def read_log(path: Path) -> list[Record]:
    """The records of a training log; a half-written last line is left out."""
    records = []
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            records.append(json.loads(line))
    return records


def sync(path: Path) -> None:
    """Waits until a file or folder has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."

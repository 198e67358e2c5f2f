"""A training run's folder: whose it is, how far it came, and which checkpoints are whole.

`run.json` says which arguments made the folder and whether the run is finished; `checkpoint-N`
folders appear under that name only when they are complete; `log.jsonl` has one line a logged step.
All of it is on the folder's record (`folders`) before it is there; what is not stays untouched.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.errors import CheckpointError
from chatbind_cli.files import lock_file, replace_text, sync, user_mode
from chatbind_cli.folders import (
    clear_temporaries,
    is_noted,
    note_made,
    refuse_foreign,
    remove_made,
)
from chatbind_cli.jsonl import Record, dumps
from chatbind_cli.numerals import whole_number

RUN_FILE: Final = "run.json"
LOG_FILE: Final = "log.jsonl"
STAGING: Final = ".saving"  # checkpoints grow here, under no name that a resuming run looks at
REJECTED_FILE: Final = "rejected.jsonl"
PICTURES: Final = ("loss.svg", "loss.png")
_MANIFEST: Final = "manifest.json"
_LOCK: Final = ".lock"
_PREFIX: Final = "checkpoint-"
_FORMAT: Final = 1


@dataclass(frozen=True)
class RunFolder:
    """The folder of one training run, and the command that makes it."""

    path: Path
    made_by: str = "pretrain"

    def finished_artifact(self) -> Record | None:
        """The artefact record of a finished run, or None."""
        run = self._read()
        return run["artifact"] if run.get("status") == "finished" else None

    @contextmanager
    def claimed(
        self, identity: Mapping[str, Any], also: Iterable[str] = (), *, overwrite: bool = False
    ) -> Iterator[None]:
        """Makes the folder this run's own, or finds that it is already, and keeps others out.

        Args:
            identity: the arguments that decide the result.
            also: names of what will be written in it by other hands.
            overwrite: start anew.

        Raises:
            ChatBindError: the folder holds something else, or a run with other arguments, or
                another process is at work in it. Nothing in it was touched.
        """
        self._check(identity, overwrite=overwrite)
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / _LOCK).open("a") as file:
            lock_file(file.fileno(), self.path)  # a killed run's lock goes with its process
            self._check(identity, overwrite=overwrite)
            if overwrite:
                remove_made(self.path)
            names = (RUN_FILE, LOG_FILE, REJECTED_FILE, *PICTURES, _LOCK, f"{STAGING}/")
            note_made(self.path, (*names, *also), made_by=self.made_by)
            if not self._read():
                self._write({"status": "running", "identity": dict(identity)})
            yield

    def _check(self, identity: Mapping[str, Any], *, overwrite: bool) -> None:
        run = {} if overwrite else self._read()
        if run:
            self._compare(run.get("identity", {}), identity)
        else:
            refuse_foreign(self.path, made_by=self.made_by)

    def confirm(self, found: Mapping[str, Any]) -> None:
        """Compares hashes of what the arguments only name with those of the run before.

        Raises:
            CheckpointError: a file that the arguments name has changed since.
        """
        run = self._read()
        if "found" in run:
            self._compare(run["found"], found)
        else:
            self._write({**run, "found": dict(found)})

    def publish_files(self, staged: Path, last: str) -> None:
        """Moves staged files into the folder; at the end the one that makes them count."""
        files = sorted(staged.iterdir(), key=lambda file: (file.name == last, file.name))
        self._note([file.name for file in files])
        for file in files:
            # some libraries keep what they write from other users
            file.chmod(user_mode(0o666))
            sync(file)
            file.replace(self.path / file.name)
        sync(self.path)

    def finish(self, artifact: Record, command: Sequence[str]) -> None:
        """Notes that the run is done, what it made, and the words that made it."""
        made = {"command": list(command), "status": "finished", "artifact": artifact}
        self._write({**self._read(), **made})

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        return next(filter(is_complete, reversed(self.checkpoints())), None)

    def checkpoints(self) -> list[Path]:
        """All checkpoints, oldest first."""
        found = {
            whole_number(folder.name.removeprefix(_PREFIX)): folder
            for folder in self.path.glob(f"{_PREFIX}*")
            if folder.is_dir()
        }
        return [found[step] for step in sorted(step for step in found if step is not None)]

    def publish_checkpoint(self, staged: Path, keep: int | None) -> Path:
        """Gives a staged checkpoint its name, and removes old ones.

        Args:
            staged: the folder under `STAGING`.
            keep: how many checkpoints stay; None for all.

        Raises:
            OSError: somebody else's folder has its name.
        """
        _seal(staged)
        final = self.path / staged.name
        if final.exists():
            # left by a run that was killed, and found incomplete by this one
            remove_made(self.path, below=final.name)
        files = (path for path in staged.rglob("*") if path.is_file())
        self._note(path.relative_to(staged.parent).as_posix() for path in files)
        staged.replace(final)
        sync(self.path)
        if keep is not None:
            whole = list(filter(is_complete, self.checkpoints()))
            for old in whole[: -max(1, keep)]:
                remove_made(self.path, below=old.name)
        return final

    def clear_staging(self) -> None:
        """Removes what a killed run left half done."""
        shutil.rmtree(self.path / STAGING, ignore_errors=True)
        clear_temporaries(self.path)

    def cut_log(self, step: int) -> None:
        """Leaves only the lines up to `step` in the log: the steps after it are done again."""
        path = self.path / LOG_FILE
        if not path.exists():
            return
        kept = [record for record in read_log(path) if record["step"] <= step]
        replace_text(path, "".join(dumps(record) + "\n" for record in kept))

    def _read(self) -> dict[str, Any]:
        """What the folder says of its run; empty where there is none."""
        path = self.path / RUN_FILE
        run = read_json(path, missing_ok=True)
        if run and run.get("format") != _FORMAT:
            raise CheckpointError(
                "is not of a training run", where=str(path), hint="choose another --output-dir"
            )
        return run

    def _note(self, names: Iterable[str]) -> None:
        """Puts files that get their names now on the record.

        Raises:
            CheckpointError: somebody else's file has one of the names.
        """
        names = list(names)
        for name in names:
            if (self.path / name).exists() and not is_noted(self.path, name):
                raise CheckpointError(
                    "is in the way, and not of this run's making",
                    where=str(self.path / name),
                    hint="move it away, and run the same command again",
                )
        note_made(self.path, names, made_by=self.made_by)

    def _write(self, run: Mapping[str, Any]) -> None:
        text = json.dumps({"format": _FORMAT, **run}, indent=2, ensure_ascii=False)
        replace_text(self.path / RUN_FILE, text + "\n")

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


def _seal(folder: Path) -> None:
    """Writes the list of a checkpoint's files, after all of them have reached the disk."""
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _MANIFEST:
            sync(path)
            sizes[str(path.relative_to(folder))] = path.stat().st_size
    replace_text(folder / _MANIFEST, json.dumps(sizes, indent=1) + "\n")


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint has all its files, in their full length."""
    try:
        sizes = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def read_log(path: Path) -> list[Record]:
    """The records of a training log, if there is one; a half-written last line is left out."""
    if not path.exists():
        return []  # of a run without a step
    lines = path.read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."

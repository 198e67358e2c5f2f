"""Makes a toy world stage by stage, and knows which stages of a folder are done.

A stage that is finished leaves a stamp; the same call goes on after the last one. `toy.json` is
written at the very end: a folder that has it is whole. What the stages do is in the other modules.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

import chatbind_cli
from chatbind_cli.console import Progress
from chatbind_cli.encoders.imagebind.weights import CONFIG_NAME, WEIGHTS_NAME
from chatbind_cli.errors import ChatBindError
from chatbind_cli.files import replace_file
from chatbind_cli.folders import RECORD, is_noted, note_made, refuse_foreign, remove_made
from chatbind_cli.jsonl import Record
from chatbind_cli.toy import encoders, language
from chatbind_cli.toy.digits import Item, load_items
from chatbind_cli.toy.fit import FULL, QUICK, VERSION, Report, Size
from chatbind_cli.toy.media import relative_path, write_media
from chatbind_cli.toy.records import record_names, write_records
from chatbind_cli.toy.sequel import ANSWERS, REVIEWS, make_sequel, readme

SUMMARY = "toy.json"
_COMMAND = "toy"
_STAMPS = ".stages"
_STAGES = ("media", "texts", "llama", "imagebind", "model", "toy")
_WITH_RECORDS = ("llama", "stage1", "model", "delta")  # of their own
_README = "README.txt"

Tell = Callable[[Record], None]


@dataclass(frozen=True, kw_only=True)
class World:
    """A toy world that is to be in a folder.

    Attributes:
        folder: where.
        seed: of everything random but the division of the handwriting.
        quick: small and untrained, for tests.
        tell: gets a record at each step of the work.
    """

    folder: Path
    seed: int
    quick: bool
    tell: Tell

    def make(self, *, overwrite: bool) -> Record:
        """Makes what is not there yet.

        Args:
            overwrite: start anew.

        Returns:
            The content of `toy.json`.

        Raises:
            ChatBindError: the folder holds something else, or a world made with other options.
        """
        _prepare(self.folder, self._identity(), overwrite=overwrite)
        train, heldout = load_items()
        size = self._size
        train, heldout = train[: size.train_items["image"]], heldout[: size.heldout_items]
        note_made(self.folder, self._names(train, heldout), made_by=_COMMAND)
        self._stage("media", lambda: self._media(train, heldout))
        self._stage("texts", lambda: write_records(train, heldout, self.folder, seed=self.seed))
        self._stage("llama", self._language_model)
        self._stage("imagebind", lambda: self._encoders(train))
        self._stage("model", self._sequel)
        self._stage("toy", lambda: self._summary(train, heldout))
        summary: Record = json.loads((self.folder / SUMMARY).read_text(encoding="utf-8"))
        return summary

    @property
    def _size(self) -> Size:
        return QUICK if self.quick else FULL

    def _identity(self) -> Record:
        return {"version": VERSION, "seed": self.seed, "quick": self.quick}

    def _names(self, train: Sequence[Item], heldout: Sequence[Item]) -> Iterator[str]:
        """Every file of the world."""
        yield from (SUMMARY, _README, *(f"{_STAMPS}/{stage}.json" for stage in _STAGES))
        for modality, count in self._size.train_items.items():
            for item in (*train[:count], *heldout):
                yield f"media/{relative_path(item, modality)}"
        yield from record_names()
        yield from (ANSWERS, REVIEWS, *(f"{name}/{RECORD}" for name in _WITH_RECORDS))
        for encoder in ("imagebind", "imagebind-unbound"):
            yield from (f"{encoder}/{WEIGHTS_NAME}", f"{encoder}/{CONFIG_NAME}")

    def _stage(self, name: str, work: Callable[[], None]) -> None:
        """Does a stage's work unless its stamp is there."""
        stamp = self.folder / _STAMPS / f"{name}.json"
        if stamp.is_file():
            self.tell({"stage": name, "status": "there already"})
            return
        self.tell({"stage": name, "status": "started"})
        start = time.monotonic()
        work()
        with replace_file(stamp) as temporary:
            temporary.write_text(json.dumps(self._identity()) + "\n", encoding="utf-8")
        seconds = round(time.monotonic() - start, 1)
        self.tell({"stage": name, "status": "done", "seconds": seconds})

    def _report(self, stage: str, part: str) -> Report:
        def report(step: int, loss: float) -> None:
            self.tell({"stage": stage, "part": part, "step": step, "loss": round(loss, 4)})

        return report

    def _media(self, train: Sequence[Item], heldout: Sequence[Item]) -> None:
        counts = self._size.train_items
        total = sum(counts.values()) + len(counts) * len(heldout)
        with Progress(total, "writing media", "files") as progress:
            for modality, count in counts.items():
                write_media(
                    [*train[:count], *heldout],
                    modality,
                    self.folder / "media",
                    seed=self.seed,
                    count=progress.advance,
                )

    def _language_model(self) -> None:
        tokenizer = language.train_tokenizer(self.seed)
        model = language.train_language_model(
            tokenizer,
            steps=self._size.language_steps,
            seed=self.seed,
            report=self._report("llama", "text"),
        )
        language.save_language_model(model, tokenizer, self.folder / "llama")

    def _encoders(self, train: Sequence[Item]) -> None:
        encoders.train_encoder(
            train,
            self.folder / "media",
            self.folder / "imagebind",
            self.folder / "imagebind-unbound",
            size=self._size,
            seed=self.seed,
            report=lambda part: self._report("imagebind", part),
        )

    def _sequel(self) -> None:
        make_sequel(self.folder, seed=self.seed, quick=self.quick)

    def _summary(self, train: Sequence[Item], heldout: Sequence[Item]) -> None:
        accuracy = encoders.measure(
            train,
            heldout,
            self.folder / "media",
            {name: self.folder / name for name in ("imagebind", "imagebind-unbound")},
        )
        self.tell({"stage": "toy", "nearest_class_mean_accuracy": accuracy})
        summary = {
            **self._identity(),
            "made_with": {
                "chatbind": chatbind_cli.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "numpy": np.__version__,
            },
            "train_items": dict(self._size.train_items),
            "heldout_items": self._size.heldout_items,
            "nearest_class_mean_accuracy": accuracy,
        }
        with replace_file(self.folder / _README) as temporary:
            temporary.write_text(readme(summary), encoding="utf-8")
        with replace_file(self.folder / SUMMARY) as temporary:
            temporary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def _prepare(folder: Path, identity: Record, *, overwrite: bool) -> None:
    """Sees to it that a folder is new, or holds the beginning of the same world.

    Raises:
        ChatBindError: it holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ChatBindError("is a file", where=str(folder), hint="name a folder")
    stamps = [_stamp(path, identity) for path in sorted((folder / _STAMPS).glob("*.json"))]
    known = is_noted(folder, SUMMARY) or (stamps and None not in stamps)
    if overwrite or not known:
        refuse_foreign(folder, made_by=_COMMAND)
    if overwrite:
        remove_made(folder)
        stamps = []
    for made in filter(None, stamps):
        if made != identity:
            changed = ", ".join(
                f"{k} {made.get(k)}" for k in identity if made.get(k) != identity[k]
            )
            raise ChatBindError(
                f"holds a toy world that was made with other settings ({changed})",
                where=str(folder),
                hint="say --overwrite to make it anew, or name another folder",
            )


def _stamp(path: Path, identity: Record) -> Record | None:
    """What the stamp of a finished stage says; None where it is none."""
    with suppress(OSError, ValueError):
        made = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(made, dict) and made.keys() == identity.keys():
            return made
    return None

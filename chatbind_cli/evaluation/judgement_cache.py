"""Judgements that outlast the run that made them, for every later one that would ask the same.

A small file each, named by the hash of what is asked, below 256 folders named by its first digits.
A file comes whole or not at all, so that any number of runs may share them without locks, and be
killed. Whatever is wrong with one, or with all of them, is said once, and the judge is asked.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from pathlib import Path
from weakref import WeakValueDictionary

from chatbind_cli.console import note
from chatbind_cli.errors import ChatBindError, RecordError
from chatbind_cli.evaluation.cases import Judgement
from chatbind_cli.evaluation.judges.judge import Judge, Verdict
from chatbind_cli.files import replace_file
from chatbind_cli.json_text import parse_line
from chatbind_cli.jsonl import dumps

_MOST_IN_A_FOLDER = 400
"""About 100,000 in all, which take 400 MB where a file has at least 4 KiB."""

_LARGEST = 64 << 10
_OURS = re.compile(r"\.?[0-9a-f]{64}\.json(\..*)?")
_KEPT = ("rule", "model", "created", "asked_again")
_HIGHEST = 10


class JudgementCache:
    """Looks judgements up in a folder, and keeps new ones; does neither where that is None."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._full = self._told = False
        self._asked: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def key(self, judge: Judge, judgement: Judgement) -> str | None:
        """The same for what would be asked in the same words; None: it is not to be found here."""
        if self._folder is None or judgement.case.problem is not None:
            return None
        return judge.cache_key(judgement)

    async def verdict(self, judge: Judge, judgement: Judgement) -> Verdict:
        """The verdict that is kept; else the judge's, for which others that ask the same wait."""
        key = self.key(judge, judgement)
        if key is None:
            return await judge.judge(judgement)
        async with self._asked.setdefault(key, asyncio.Lock()):
            found = self.find(key, judgement)
            if found is None:
                found = await judge.judge(judgement)
                self.keep(key, judgement, found)
            return found

    def find(self, key: str, judgement: Judgement) -> Verdict | None:
        """The verdict of an earlier judgement with this key, at no cost now."""
        path = self._path(key)
        try:
            if path.is_file():  # no pipe, which may have no end
                with path.open("rb") as file:
                    return _verdict(file.read(_LARGEST + 1), str(path), key, judgement)
        except (OSError, ChatBindError) as error:
            self._tell(error)
        return None

    def keep(self, key: str, judgement: Judgement, verdict: Verdict) -> None:
        """Keeps a verdict, unless it is a failure."""
        if verdict.scores is None or self._full:
            return
        shown = verdict.scores[::-1] if judgement.swapped else verdict.scores
        kept = {name: verdict.metadata[name] for name in _KEPT if name in verdict.metadata}
        record = {"key": key, "scores": shown, "content": verdict.content, "metadata": kept}
        data = dumps(record).encode()
        if len(data) > _LARGEST:
            return
        path = self._path(key)
        try:
            # after a power cut it is broken at worst; the event loop does not wait for the disk
            with replace_file(path, durable=False) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            self._full = True
            self._tell(error)
        else:
            _make_room(path.parent)

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / key[:2] / f"{key}.json"

    def _tell(self, error: Exception) -> None:
        if not self._told:
            note(f"the cache of judgements, {self._folder}: {error}; the judge is asked instead")
        self._told = True


def _verdict(data: bytes, where: str, key: str, judgement: Judgement) -> Verdict:
    """The verdict that a file holds, which may come from anybody."""
    record, _, _, problem = parse_line(data, where)
    scores, content, kept = (record.get(name) for name in ("scores", "content", "metadata"))
    if problem is not None or len(data) > _LARGEST or record.get("key") != key:
        raise problem or RecordError("is not the judgement that its name says", where=where)
    if not (
        isinstance(scores, list)
        and len(scores) == len(judgement.case.answers)
        and all(type(score) in (int, float) and 0 <= score <= _HIGHEST for score in scores)
        and isinstance(content, str)
        and isinstance(kept, dict)
    ):
        raise RecordError("holds no scores and words", where=where)
    known = {name: kept[name] for name in _KEPT if isinstance(kept.get(name), str | int)}
    return Verdict(
        scores=tuple(map(float, scores[::-1] if judgement.swapped else scores)),
        content=content,
        metadata={**known, "cached": True},
    )


def _make_room(folder: Path) -> None:
    """Removes the oldest of a folder's files where it has too many."""
    with suppress(OSError):  # other runs do so, too
        ours = [path for path in folder.iterdir() if _OURS.fullmatch(path.name)]
        if len(ours) > _MOST_IN_A_FOLDER:
            ours.sort(key=lambda path: path.lstat().st_mtime)
            for path in ours[:-_MOST_IN_A_FOLDER]:
                path.unlink(missing_ok=True)

"""Mutants of media through `encode`, `vqa` and `ask`, in batches."""

from __future__ import annotations

import json
import math
import os
import random
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fuzzing.mutants import bomb, mutate
from fuzzing.process import (
    MOST_SECONDS,
    Campaign,
    Ended,
    Result,
    ill,
    is_good,
    kind_of,
    run,
    strict,
    write_lines,
)
from fuzzing.seeds import MODALITY, media_seeds, suffix


@cache
def seeds(seed: int) -> dict[str, list[bytes]]:
    """The good media, made once a process."""
    return media_seeds(seed)


def medium(campaign: Campaign, name: str) -> tuple[str, str | None, random.Random]:
    """The ending of a mutant's name, the modality that is said, if one is, and its generator."""
    kind, r = kind_of(name), random.Random(f"{campaign.seed}/{name}")
    said = MODALITY[kind] if r.random() < 0.5 or kind.startswith("thermal") else None
    if is_good(name):
        return suffix(kind), said, r
    said = r.choice(sorted(set(MODALITY.values()))) if r.random() < 0.06 else said
    end = suffix(r.choice(sorted(MODALITY))) if r.random() < 0.08 else suffix(kind)
    return end, said, r


def content(campaign: Campaign, name: str, r: random.Random) -> bytes:
    """A mutant; number 0 is the good file."""
    kind, good = kind_of(name), seeds(campaign.seed)
    if is_good(name):
        return good[kind][0]
    # by its place, so that no batch is all bombs
    number = int(name.rpartition("-")[2]) + list(MODALITY).index(kind)
    data = bomb(kind, r) if number % 8 == 7 else None
    if data is None:
        data = mutate(r.choice(good[kind]), r.choice(good[r.choice(sorted(good))]), r)
    return data


def _write_all(campaign: Campaign, folder: Path, files: dict[str, str]) -> None:
    """Writes the mutants in a fork: making bombs takes memory that later forks would inherit."""
    child = os.fork()
    if not child:
        code = 1
        try:
            for name, file in files.items():
                data = content(campaign, name, medium(campaign, name)[2])
                campaign.write(folder / file, file, data)
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"the mutants {', '.join(files)} could not be made")


def media_job(campaign: Campaign, names: list[str], result: Result) -> None:
    """A batch of media through `encode`, `vqa` and `ask`."""
    with tempfile.TemporaryDirectory(dir=campaign.home) as place:
        folder, said, files = Path(place), {}, {}
        for name in names:
            end, said[name], _ = medium(campaign, name)
            files[name] = name + end
            result.runs[kind_of(name), "runs"] += 1
        seeds(campaign.seed)  # once a process, not once a fork
        _write_all(campaign, folder, files)
        trial = MediaTrial(campaign, folder, files, said, result)
        refused = trial.settle("encode", names)
        named = [name for name in names if said[name] and name not in trial.guilty]
        answered = set(named[:12]) - trial.settle("vqa", named[:12])
        for name in sorted(answered & refused):
            nothing = Ended(0, 0, 0, "", b"", "")
            result.find(name, ["vqa"], nothing, "vqa answers what encode refuses")
        for name in named[:1]:
            words = ["ask", "-m", str(campaign.models / "model"), f"--{said[name]}", files[name]]
            words += ["--max-new-tokens", "4", "What is it?"]
            ended = run(words, folder, MOST_SECONDS * campaign.patience)
            result.cost(kind_of(name), name, ended)
            if problem := ill(ended, (0, 1)):
                result.find(name, words, ended, problem)
            elif (ended.code == 1) != (name in refused):
                result.find(name, words, ended, "ask and encode disagree")


@dataclass
class MediaTrial:
    """The mutants of a batch in their folder, and who of them is guilty."""

    campaign: Campaign
    folder: Path
    files: dict[str, str]
    said: dict[str, str | None]
    result: Result
    guilty: set[str] = field(default_factory=set)

    def settle(self, command: str, names: list[str]) -> set[str]:
        """Runs a command until every mutant has a record or is found guilty.

        Returns:
            Those that were refused with a proper error.
        """
        refused: set[str] = set()
        todo, script = [names] if names else [], command == "encode"
        while todo:
            part = todo.pop()
            words, ended, records = self._run(command, part, script=script)
            script = False
            problem = ill(ended, (0, 3))
            got = defaultdict(list)
            for record in records:
                got[str(record.get("question_id", record.get("id")))].append(record)
            missing = [name for name in part if name not in got]
            for name in part if not problem or not missing else []:
                self._judge(name, words, ended, got[name], refused)
            one = len(part) == 1
            self.result.cost(kind_of(part[0]) if one else "batches", part[0], ended)
            if not problem and not missing:
                continue
            if len(part) == 1:
                self._blame(part[0], words, ended, problem or "no record")
            elif not missing:  # an ill end after good records: who?
                todo += [part[: len(part) // 2], part[len(part) // 2 :]]
            else:
                for name in set(part) - set(missing):
                    self._judge(name, words, ended, got[name], refused)
                first = missing[:4] if len(missing) > 8 else missing[: (len(missing) + 1) // 2]
                todo += [p for p in (missing[len(first) :], first) if p]
        return refused

    def _run(self, command: str, names: list[str], *, script: bool) -> Any:
        listed, models = self.folder / "list.jsonl", self.campaign.models
        output = self.folder / "out.jsonl"
        output.unlink(missing_ok=True)
        lines = []
        for name in names:
            modality, path = self.said[name], self.files[name]
            if command == "vqa":
                lines.append({"question_id": name, "text": "What is it?", modality: path})
            else:
                lines.append(
                    {"id": name, "path": path} | ({"modality": modality} if modality else {})
                )
        write_lines(listed, lines)
        if command == "vqa":
            words = ["vqa", "-m", str(models / "model"), "-q", listed.name]
            words += ["--max-new-tokens", "4"]
        else:
            words = ["encode", "--encoder", str(models / "encoder"), "--inputs", listed.name]
        words += ["--media-root", ".", "-o", output.name]
        seconds = (MOST_SECONDS + len(names) - 1) * self.campaign.patience
        ended = run(words, self.folder, seconds, script=script)
        records = []
        for line in output.read_bytes().splitlines() if output.exists() else []:
            try:
                records.append(strict(line))
            except ValueError:  # the last line of a process that was killed, or NaN
                if line.endswith(b"}"):
                    records.append({"id": json.loads(line).get("id"), "error": "NaN in a record"})
        return words, ended, records

    def _judge(
        self, name: str, words: list[str], ended: Ended, records: list[Any], refused: set[str]
    ) -> None:
        """One record, with good numbers or a good error."""
        record, problem = records[0], ""
        error = record.get("error")
        if len(records) > 1:
            problem = f"{len(records)} records"
        elif error is not None:
            if not isinstance(error, str) or "\n" in error or self.files[name] not in error:
                problem = f"an error that is not one line with the file's name: {error!r}"
            elif "internal error" in error or "Traceback" in error or error == "NaN in a record":
                problem = error
            refused.add(name)
        elif words[0] == "encode":
            numbers = record.get("embedding")
            if not numbers or not all(isinstance(n, float) and math.isfinite(n) for n in numbers):
                problem = "an embedding that is not finite numbers"
        elif not isinstance(record.get("text"), str):
            problem = "neither text nor error"
        if error is not None and is_good(name):
            problem = f"the good file is refused: {error}"
        if words[0] == "encode":
            self.result.runs[kind_of(name), "refused" if error is not None else "ok"] += 1
        if problem:
            self._blame(name, words, ended, problem)

    def _blame(self, name: str, words: list[str], ended: Ended, problem: str) -> None:
        self.guilty.add(name)
        said = f" ({self.said[name]})" if self.said[name] else ""
        self.result.find(name, [*words, self.files[name] + said], ended, problem)

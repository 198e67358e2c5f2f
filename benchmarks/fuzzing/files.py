"""Mutants of records and of model folders through their commands, a process each."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from pathlib import Path

from fuzzing.process import (
    MOST_SECONDS,
    Campaign,
    Ended,
    Result,
    ill,
    is_good,
    kind_of,
    run,
    stray,
    strict,
    write_lines,
)
from fuzzing.values import mutate_config, mutate_records, mutate_weights

_DELTA = "apply-delta --base IT --delta delta --target out"
_SEE = "encode --encoder IT media/0.png"
_HEAR = "encode --encoder IT media/tone.wav"
_ASK = "ask --max-new-tokens 4 hello -m"
_WITH = "--projector projector.safetensors"
_ASK_WITH = f"{_ASK} IT {_WITH} --encoder encoder"
_CONVERT_WITH = f"convert IT {_WITH} -o out"
_OF_WHOLE_MODELS = (f"{_ASK} IT", "extract-projector IT -o out.safetensors", "convert IT -o out")
_REVIEW = "review --judge rule -q questions.jsonl"
_BOTH = "--answer-list answers.jsonl others.jsonl"

# what is mutated: folder of the models, file in it, the command lines that read it
WEIGHTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "model-safetensors": ("model", "model.safetensors", _OF_WHOLE_MODELS),
    "encoder-safetensors": ("encoder", "imagebind.safetensors", (_SEE,)),
    "encoder-config": ("encoder", "config.json", (f"{_SEE} media/tone.wav",)),
    "encoder-pth": (
        "pth",
        "encoder.pth",
        (
            "encode --encoder IT/encoder.pth media/0.png",
            "extract-projector IT/encoder.pth -o out.safetensors",
        ),
    ),
    "encoder-old-pth": ("old-pth", "encoder.pth", ("encode --encoder IT/encoder.pth media/0.png",)),
    "languagebind-config": ("languagebind", "config.json", (_SEE,)),
    "languagebind-sound": ("languagebind-sound", "config.json", (_HEAR,)),
    "languagebind-safetensors": ("languagebind-sound", "model.safetensors", (_HEAR,)),
    "languagebind-bin": (
        "languagebind",
        "pytorch_model.bin",
        (_SEE, "encode --encoder IT/pytorch_model.bin media/0.png"),
    ),
    "llama-bin": ("bin", "pytorch_model.bin", (_DELTA, _ASK_WITH)),
    "llama-old-bin": ("old-bin", "pytorch_model.bin", (_DELTA,)),
    "projector-bin": (
        "pbin",
        "projector.bin",
        (
            "extract-projector IT/projector.bin -o out.safetensors",
            f"{_ASK} llama --projector IT/projector.bin --encoder encoder",
        ),
    ),
    "shard-index": (
        "shards",
        "model.safetensors.index.json",
        (_ASK_WITH, _CONVERT_WITH, _DELTA),
    ),
    "delta-safetensors": (
        "delta",
        "model.safetensors",
        ("apply-delta --base llama --delta IT --target out",),
    ),
    "config": ("model", "config.json", _OF_WHOLE_MODELS),
    "llama-config": ("llama", "config.json", (_CONVERT_WITH, _DELTA)),
    "tokenizer": ("model", "tokenizer.json", (f"{_ASK} IT",)),
    "tokenizer-config": (
        "model",
        "tokenizer_config.json",
        (f"{_ASK} IT", f"{_ASK} IT --prompt-style chat"),
    ),
    "generation-config": ("model", "generation_config.json", (f"{_ASK} IT",)),
}
# which file of records is mutated: the command line with it as IT
RECORDS: dict[str, tuple[str, str]] = {
    "questions": ("questions", "vqa -m model -q IT --media-root media --max-new-tokens 4"),
    "lists": ("lists", "encode --encoder encoder --inputs IT --media-root media"),
    "conversations": ("conversations", "encode --encoder encoder --data IT --media-root media"),
    "asked-media": ("questions", "encode --encoder encoder --data IT --media-root media"),
    "answers": ("others", _REVIEW + " --answer-list answers.jsonl IT"),
    "baseline": ("answers", _REVIEW + " --answer-list IT others.jsonl"),
    "review-questions": ("questions", f"review --judge rule -q IT {_BOTH}"),
    "contexts": ("contexts", f"{_REVIEW} --context IT {_BOTH}"),
    "reviews": ("reviews", "summarize --json IT"),
    "report": ("reviews", "summarize --html out.html -q questions.jsonl IT"),
}


def records_job(campaign: Campaign, names: list[str], result: Result) -> None:
    """A mutant of a file of records through its command."""
    good = json.loads((campaign.home / "records.json").read_text())
    for name in names:
        which, line = RECORDS[kind_of(name)]
        r = random.Random(f"{campaign.seed}/{name}")
        with tempfile.TemporaryDirectory(dir=campaign.home) as place:
            folder = Path(place)
            for other, records in good.items():
                write_lines(folder / f"{other}.jsonl", records)
            data = mutate_records(good[which], r)
            if is_good(name):
                data = (folder / f"{which}.jsonl").read_bytes()
            campaign.write(folder / "IT.jsonl", f"{name}.jsonl", data)
            campaign.link_models(folder)
            words = line.replace("IT", "IT.jsonl").split()
            ended = run(words, folder, MOST_SECONDS * campaign.patience)
        _tally(
            result,
            name,
            words,
            ended,
            ill(ended, (0, 1, 2, 3)) or _miscounted(words, data, ended) or stray(ended),
        )


def _miscounted(words: list[str], data: bytes, ended: Ended) -> str:
    """What is wrong with the records on stdout of a command that was given these lines."""
    if ended.code == 2:
        return ""
    try:
        records = [strict(line) for line in ended.stdout.splitlines()]
    except ValueError as error:
        return f"stdout is not strict JSON: {error}"
    lines = [line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    if not lines or not lines[0].lstrip().startswith(b"{"):
        return ""  # compressed, an array, or no records
    if words[0] not in ("vqa", "encode") or "--data" in words:
        return ""
    if ended.code == 1:
        return "a line ends the run"
    distinct = len({_identity(line) for line in lines}) if words[0] == "vqa" else len(set(lines))
    if len(records) < distinct or (words[0] == "vqa" and len(records) > len(lines)):
        return f"{len(records)} records for {len(lines)} lines"
    return ""


def _identity(line: bytes) -> str:
    try:
        record = json.loads(line)
        return repr(record.get("question_id", record.get("id")))
    except (ValueError, AttributeError, RecursionError):
        return repr(line)


def _tally(result: Result, name: str, words: list[str], ended: Ended, problem: str) -> None:
    result.runs[kind_of(name), "runs"] += 1
    result.cost(kind_of(name), name, ended)
    if not problem and ended.code and is_good(name):
        problem = "the good file is refused"
    if problem:
        result.find(name, words, ended, problem)
    else:
        result.runs[kind_of(name), "refused" if ended.code else "ok"] += 1


def weights_job(campaign: Campaign, names: list[str], result: Result) -> None:
    """A mutant of a file of a model folder through one of its commands."""
    for name in names:
        source, file, lines = WEIGHTS[kind_of(name)]
        r = random.Random(f"{campaign.seed}/{name}")
        with tempfile.TemporaryDirectory(dir=campaign.home) as place:
            folder = Path(place)
            campaign.link_models(folder)
            shutil.copytree(campaign.models / source, folder / "IT")
            for module in ("evil.py", "configuration_evil.py"):
                (folder / "IT" / module).write_text("open('PWNED', 'w').write('run')\n")
            target = folder / "IT" / file
            good = target.read_bytes()
            if is_good(name):
                data, line = good, lines[0]
            else:
                json_file = file.endswith(".json")
                data = mutate_config(good, file, r) if json_file else mutate_weights(good, r)
                line = r.choice(lines)
            campaign.write(target, f"{name}-{file}", data)
            words = line.split()
            ended = run(words, folder, MOST_SECONDS * campaign.patience)
            problem = ill(ended, (0, 1, 3)) or stray(ended)
            if list(folder.rglob("PWNED")):
                problem = "code of the file was run"
            elif not problem and ended.code == 1 and ended.stdout.strip():
                problem = "a failed command wrote on stdout"
        _tally(result, name, words, ended, problem)

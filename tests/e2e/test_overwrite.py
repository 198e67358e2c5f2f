"""`--overwrite`, by every command that has it: ours is replaced, and nobody else's is touched."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from chatbind_cli.cli import run
from chatbind_cli.folders import RECORD

SHORT = "--max-steps 2 --save-steps 1 --per-device-train-batch-size 4 "
SHORT += "--gradient-accumulation-steps 1 --device cpu"
QUESTIONS = "toy/eval/questions-audio.jsonl"
ANSWERS = "toy/eval/answers-reference-audio.jsonl toy/eval/answers-model-audio.jsonl"
ENCODE = "encode --encoder toy/imagebind toy/media/image/heldout-0000.png"

FOLDERS = {
    "toy": "toy out --quick",
    "make-delta": "make-delta --base toy/llama --target toy/model --delta out --shard-size 0.001",
    "apply-delta": "apply-delta --base toy/llama --delta toy/delta --target out --shard-size 0.001",
    "convert": "convert toy/model -o out --shard-size 0.001",
    "join": "convert toy/llama --projector toy/stage1/projector.safetensors -o out",
    "encode": f"{ENCODE} --store out",
    "pretrain": "pretrain -m toy/llama --encoder toy/imagebind --data few.json "
    f"--media-root toy/media -o out {SHORT}",
    "finetune": "finetune -m toy/llama --encoder toy/imagebind --data few.json "
    f"--projector toy/stage1/projector.safetensors --media-root toy/media -o out {SHORT}",
}
CHEAP = [name for name in FOLDERS if name not in ("toy", "finetune")]
FILES = {
    "encode": f"{ENCODE} -o out",
    "vqa": f"vqa -m toy/model -q {QUESTIONS} --media-root toy/media --max-new-tokens 4 -o out",
    "review": f"review -q {QUESTIONS} --judge rule --answers {ANSWERS} -o out",
}
SINGLE = {
    "summarize": ("summarize toy/eval/reviews-audio.jsonl --html {}", "out.html"),
    "extract-projector": ("extract-projector toy/stage1 -o {}", "out.safetensors"),
    "extract-projector, published": ("extract-projector toy/stage1 -o {}", "out.bin"),
}
# What a user has, alone and together; names that runs, stores and toy worlds have, too.
FOREIGN = (
    (
        "embeddings/part-00000/embeddings.sqlite",
        "checkpoint-500/optimizer.pt",
        "llama-7b/config.json",
        "log.jsonl",
        "media/image/holiday.png",
        "thesis.txt",
    ),
    ("run.json",),
    ("store.json", "embeddings.sqlite"),
    (".lock",),
    (".stages/media.json",),
    (".saving/result/x", ".notes.abcd1234.tmp"),
)


def tree(root: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(root)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in root.rglob("*")
    }


@pytest.fixture
def here(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with links to all that a toy world holds."""
    world, _ = made
    (tmp_path / "toy").symlink_to(world)
    captions = json.loads((world / "train/captions.json").read_text())
    (tmp_path / "few.json").write_text(json.dumps(captions[:8]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(words: str) -> tuple[int, str]:
    return run(shlex.split(words))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_somebody_else_is_refused_by_one_line_and_stays(here: Path, name: str) -> None:
    for number, names in enumerate(FOREIGN):
        for path in (here / "out" / name for name in names):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("[]")
        before = tree(here)
        for overwrite in ("", " --overwrite"):
            code, message = call(FOLDERS[name] + overwrite)
            assert code == 1, message
            assert message.startswith("chatbind: error: ") and "\n" not in message
            assert not overwrite or any(name in message for name in names)
            assert tree(here) == before, (names, overwrite)
        (here / "out").rename(here / f"gone-{number}")


@pytest.mark.parametrize("name", [n for n in FOLDERS if n != "toy"])
def test_a_made_folder_is_replaced_unless_somebody_s_file_is_in_it(here: Path, name: str) -> None:
    out = here / "out"
    assert call(FOLDERS[name]) == (0, "")
    files = {path for path in tree(out) if (out / path).is_file()}
    assert call(FOLDERS[name])[0] == 0  # it is there already
    places = [out, *(path for path in out.rglob("*") if path.is_dir())]
    for place in places:
        for make in (Path.touch, Path.mkdir, lambda path: path.symlink_to(here / "few.json")):
            mine = place / "thesis"
            make(mine)
            before = tree(here)
            code, message = call(f"{FOLDERS[name]} --overwrite")
            assert code == 1 and str(mine.relative_to(here)) in message
            assert tree(here) == before
            mine.rmdir() if mine.is_dir() and not mine.is_symlink() else mine.unlink()
    assert call(f"{FOLDERS[name]} --overwrite") == (0, "")
    assert {path for path in tree(out) if (out / path).is_file()} == files
    (out / RECORD).unlink()  # as made by a version that kept none
    code, message = call(f"{FOLDERS[name]} --overwrite")
    assert code == 1 and "choose another folder, or remove this one by hand" in message


def killed_after(renames: int, words: str) -> bool:
    """Runs a command in a child that dies at a rename; whether it came to its end before."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) in (0, 9)
        return os.waitstatus_to_exitcode(status) == 0
    left = renames
    replace = Path.replace

    def dying(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            os._exit(9)
        return replace(self, target)

    try:
        signal.alarm(100)
        # a fork's first call makes a new thread pool, which two threads at once find half made
        torch.set_num_threads(1)
        Path.replace = dying  # type: ignore[method-assign, assignment]
        code, message = call(words)
        if code:
            os.write(2, message.encode())
        os._exit(0 if code == 0 else 1)
    finally:
        os._exit(2)


def kills() -> Iterator[Any]:
    for name in CHEAP:
        for renames in (0, 1, 2, 5, 13):
            slow = name == "pretrain" and renames not in (2, 13)
            if not slow:
                yield pytest.param(name, renames, id=f"{name}-{renames}")


@pytest.mark.parametrize(("name", "renames"), list(kills()))
def test_what_a_kill_left_is_replaced_and_leaves_no_litter(
    here: Path, name: str, renames: int
) -> None:
    killed_after(renames, FOLDERS[name])
    names = {"out", *(name for name in os.listdir(here) if not name.startswith(".out."))}
    assert call(f"{FOLDERS[name]} --overwrite") == (0, "")
    killed_after(renames, f"{FOLDERS[name]} --overwrite")
    assert call(f"{FOLDERS[name]} --overwrite") == (0, "")
    assert set(os.listdir(here)) == names
    assert not [path for path in (here / "out").rglob(".*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize("name", FILES)
def test_a_record_file_is_replaced_and_somebody_s_file_is_not(here: Path, name: str) -> None:
    out = here / "out"
    for text in ("Chapter one\n", "Chapter one", '{"question_id": 1, "text": "?"}\n', "[1]\n"):
        out.write_text(text)
        code, message = call(f"{FILES[name]} --overwrite")
        assert code == 1 and "is not a file of records" in message
        assert out.read_text() == text
    out.write_text("")
    assert call(f"{FILES[name]} --overwrite") == (0, "")
    first = out.read_bytes()
    out.write_bytes(first[:-9])
    assert call(f"{FILES[name]} --overwrite") == (0, "")
    assert len(out.read_bytes()) == len(first)


@pytest.mark.parametrize("name", SINGLE)
def test_a_file_is_replaced_only_where_it_shows_that_it_is_ours(here: Path, name: str) -> None:
    words, file = SINGLE[name]
    out = here / file
    foreign = {
        "text": b"Chapter one",
        "model": (here / "toy/model/model.safetensors").read_bytes(),
        "page": b"<!doctype html><title>mine</title>",
    }
    for data in foreign.values():
        out.write_bytes(data)
        code, message = call(words.format(file))
        assert code == 1 and "is there already, and is not a " in message
        assert out.read_bytes() == data
    out.unlink()
    for _ in range(2):
        assert call(words.format(file)) == (0, "")


@pytest.mark.parametrize("kind", ["itself", "symbolic", "hard"])
@pytest.mark.parametrize(
    "words",
    [
        "vqa -m toy/model -q input -o output",
        "encode --encoder toy/imagebind --inputs input -o output",
        "encode --encoder toy/imagebind --data input -o output",
        "encode --encoder toy/imagebind --zero-shot input few.json -o output",
        f"review -q input --answers {ANSWERS} -o output",
        f"review -q {QUESTIONS} --answers input {ANSWERS.split()[1]} -o output",
        f"review -q {QUESTIONS} --answers {ANSWERS} --context input -o output",
        "summarize input --html output",
        "summarize toy/eval/reviews-audio.jsonl -q input --html output",
        "extract-projector input -o output",
    ],
)
def test_an_output_that_is_an_input_is_a_usage_error(here: Path, words: str, kind: str) -> None:
    text = (here / QUESTIONS).read_text()
    (here / "input").write_text(text)
    output = {"itself": "input", "symbolic": "link", "hard": "hard"}[kind]
    (here / "link").symlink_to("input")
    (here / "hard").hardlink_to(here / "input")
    for more in ("", " --overwrite"):
        if more and words.startswith(("summarize", "extract")):
            continue
        code, message = call(words.replace("output", output) + more)
        assert (code, "the output is the input" in message) == (2, True), message
        assert (here / "input").read_text() == text


@pytest.mark.parametrize("name", ["make-delta", "apply-delta", "convert", "pretrain", "finetune"])
def test_a_folder_that_holds_an_input_is_a_usage_error(here: Path, name: str) -> None:
    source = {"make-delta": "toy/llama", "apply-delta": "toy/delta", "convert": "toy/model"}.get(
        name
    )
    if source is None:
        source = "few.json"
        (here / "out").mkdir()
        shutil.copy(here / source, here / "out/input")
    else:
        shutil.copytree(here / source, here / "out/input")
    before = tree(here)
    code, message = call(FOLDERS[name].replace(f" {source}", " out/input") + " --overwrite")
    assert (code, "the output holds the input" in message) == (2, True), message
    assert tree(here) == before

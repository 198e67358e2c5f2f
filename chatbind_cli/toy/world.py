"""Makes a toy world stage by stage, and knows which stages of a folder are done.

`toy.json` says from the start what is made in a folder, and in the end has the figures: then the
world is whole. The last stage but one is what the program itself makes of the world, by the
commands that a user would type in its folder; its `README.txt`, which is here, too, shows them.
"""

from __future__ import annotations

import json
import platform
import shlex
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers

import chatbind_cli
from chatbind_cli import launch
from chatbind_cli.console import Progress
from chatbind_cli.encoders.imagebind.weights import CONFIG_NAME, WEIGHTS_NAME
from chatbind_cli.errors import ChatBindError
from chatbind_cli.files import replace_file
from chatbind_cli.folders import RECORD, is_noted, note_made, refuse_foreign, remove_made
from chatbind_cli.jsonl import Record
from chatbind_cli.toy.binding import ToyEncoder
from chatbind_cli.toy.digits import Item, load_items
from chatbind_cli.toy.encoders import make_encoders, measure
from chatbind_cli.toy.fit import FULL, QUICK, VERSION, Size
from chatbind_cli.toy.imagebind import ToyImageBind
from chatbind_cli.toy.language import make_language_model
from chatbind_cli.toy.media import relative_path, write_media
from chatbind_cli.toy.texts import record_names, write_records

_COMMAND = "toy"
_SUMMARY, _README = "toy.json", "README.txt"
_FIGURES = "nearest_class_mean_accuracy"
_LAST_RECORDS = "eval/contexts.jsonl"
_IMAGEBIND, _PE_AV = "imagebind", "pe-av"
_ANSWERS = "eval/answers-model-audio.jsonl"
_REVIEWS = "eval/reviews-audio.jsonl"
_WITH_RECORDS = ("llama", "stage1", "model", "delta")  # of their own

_COMMANDS = f"""\
chatbind pretrain -m llama --encoder imagebind --data train/captions.json --media-root media \\
    --learning-rate 1e-2 --num-train-epochs 2 --gradient-accumulation-steps 1 -o stage1
chatbind finetune -m llama --projector stage1/projector.safetensors \\
    --encoder imagebind --store stage1/embeddings --data train/instructions.json \\
    --learning-rate 1e-3 --num-train-epochs 1 --per-device-train-batch-size 16 \\
    --gradient-accumulation-steps 1 -o model
chatbind make-delta --base llama --target model --delta delta
chatbind vqa -m model -q eval/questions-audio.jsonl --media-root media --max-new-tokens 32 \\
    -o {_ANSWERS}
chatbind review --question eval/questions-audio.jsonl --judge rule \\
    --answer-list eval/answers-reference-audio.jsonl {_ANSWERS} \\
    -o {_REVIEWS}
"""

# So that the same seed gives the same model on every machine.
_REPEATABLE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "CHATBIND_QUIET": "1"}

Tell = Callable[[Record], None]


def make_world(
    folder: Path, *, seed: int, quick: bool, overwrite: bool, tell: Tell, huggingface: bool = False
) -> None:
    """Makes what is not there yet of a toy world.

    Args:
        folder: where.
        seed: of everything random but the division of the handwriting.
        quick: small and untrained, for tests.
        overwrite: start anew.
        tell: gets a record at each step of the work.
        huggingface: a PE-AV, too.

    Raises:
        ChatBindError: the folder holds something else, or a world made with other options.
    """
    size = QUICK if quick else FULL
    train, heldout = load_items()
    train, heldout = train[: size.train_items["image"]], heldout[: size.heldout_items]
    identity = {"version": VERSION, "seed": seed, "quick": quick}
    summary = _begun(folder, identity, overwrite=overwrite) or {**identity, **_made_with(size)}
    kinds = _kinds(huggingface=huggingface)
    note_made(folder, _names(size, train, heldout, kinds), made_by=_COMMAND)
    _write_summary(folder, summary)
    media, measured = folder / "media", summary.get(_FIGURES, {})
    do = partial(_do_stage, tell)
    has_records = (folder / _LAST_RECORDS).is_file()

    def report(stage: str, part: str, step: int, loss: float) -> None:
        tell({"stage": stage, "part": part, "step": step, "loss": round(loss, 4)})

    def finish() -> None:
        figures = dict(measured)
        for kind in (name for name in kinds if name not in measured):
            figures |= measure(train, heldout, media, _pair(folder, kind))
        tell({"stage": "toy", _FIGURES: figures})
        whole = {**summary, _FIGURES: figures}
        with replace_file(folder / _README) as temporary:
            temporary.write_text(_readme(whole), encoding="utf-8")
        _write_summary(folder, whole)

    do("media", has_records, lambda: _write_media(media, size, train, heldout, seed))
    do("texts", has_records, lambda: write_records(train, heldout, folder, seed=seed))
    do(
        "llama",
        (folder / "llama").is_dir(),
        lambda: make_language_model(
            folder / "llama", size.language_steps, seed, partial(report, "llama", "text")
        ),
    )
    for name, kind in kinds.items():
        pair = _pair(folder, name)
        done = all((place / CONFIG_NAME).is_file() for place in pair)
        telling = partial(report, name)
        do(name, done, partial(make_encoders, kind, train, media, pair, size, seed, telling))
    do("model", bool(measured), lambda: run_commands(folder, seed=seed, quick=quick))
    do("toy", kinds.keys() <= measured.keys(), finish)


def _kinds(*, huggingface: bool) -> dict[str, Callable[[], ToyEncoder]]:
    """What makes an untrained encoder, by the name of its folder."""
    if not huggingface:
        return {_IMAGEBIND: ToyImageBind}
    from chatbind_cli.toy.pe_av import ToyPeAv  # noqa: PLC0415 - loads timm

    return {_IMAGEBIND: ToyImageBind, _PE_AV: ToyPeAv}


def _pair(folder: Path, kind: str) -> tuple[Path, Path]:
    """Where the encoder of a kind lies, and the one that was never bound."""
    return folder / kind, folder / f"{kind}-unbound"


def _do_stage(tell: Tell, name: str, done: bool, work: Callable[[], None]) -> None:
    if done:
        tell({"stage": name, "status": "there already"})
        return
    tell({"stage": name, "status": "started"})
    start = time.monotonic()
    work()
    tell({"stage": name, "status": "done", "seconds": round(time.monotonic() - start, 1)})


def _begun(folder: Path, identity: Record, *, overwrite: bool) -> Record:
    """What `toy.json` says where the same world was begun; else {}, and the folder is cleared.

    Raises:
        ChatBindError: it holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ChatBindError("is a file", where=str(folder), hint="name a folder")
    summary = folder / _SUMMARY
    if overwrite or not (is_noted(folder, _SUMMARY) and summary.is_file()):
        refuse_foreign(folder, made_by=_COMMAND)
        summary.unlink(missing_ok=True)  # first: after a kill it would vouch for what is gone
        remove_made(folder)
        return {}
    made: Record = json.loads(summary.read_text(encoding="utf-8"))
    changed = ", ".join(f"{k} {made.get(k)}" for k in identity if made.get(k) != identity[k])
    if changed:
        raise ChatBindError(
            f"holds a toy world that was made with other settings ({changed})",
            where=str(folder),
            hint="say --overwrite to make it anew, or name another folder",
        )
    return made


def _made_with(size: Size) -> Record:
    return {
        "made_with": {
            "chatbind": chatbind_cli.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        "train_items": dict(size.train_items),
        "heldout_items": size.heldout_items,
    }


def _write_summary(folder: Path, summary: Record) -> None:
    with replace_file(folder / _SUMMARY) as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def _names(
    size: Size, train: Sequence[Item], heldout: Sequence[Item], kinds: Collection[str]
) -> Iterator[str]:
    """Every file of the world."""
    yield from (_SUMMARY, _README)
    for modality, count in size.train_items.items():
        for item in (*train[:count], *heldout):
            yield f"media/{relative_path(item, modality)}"
    yield from record_names()
    yield from (_ANSWERS, _REVIEWS, *(f"{name}/{RECORD}" for name in _WITH_RECORDS))
    for kind in kinds:
        files = (WEIGHTS_NAME, CONFIG_NAME) if kind == _IMAGEBIND else (RECORD,)
        yield from (f"{place}/{file}" for place in _pair(Path(), kind) for file in files)


def _write_media(
    folder: Path, size: Size, train: Sequence[Item], heldout: Sequence[Item], seed: int
) -> None:
    counts = size.train_items
    total = sum(counts.values()) + len(counts) * len(heldout)
    with Progress(total, "writing media", "files") as progress:
        for modality, count in counts.items():
            items = [*train[:count], *heldout]
            write_media(items, modality, folder, seed=seed, count=progress.advance)


def run_commands(folder: Path, *, seed: int, quick: bool) -> None:
    """Runs the commands in a world's folder; each goes on where it was stopped.

    Raises:
        ChatBindError: one of them failed.
    """
    for line in _COMMANDS.replace("\\\n", "").splitlines():
        words = shlex.split(line)[1:]
        if words[0] in ("pretrain", "finetune"):
            words += ["--seed", str(seed), *(["--max-steps", "2"] if quick else [])]
        launch.run_apart(words, folder=folder, environment=_REPEATABLE)


_README_TEXT = """\
A toy world for ChatBind: the ten digits in six modalities
==========================================================

Made by `chatbind toy` from seed {seed}{quick}. Handwriting: scikit-learn's load_digits, 1797 scans.
Everything else is computed: nothing here was downloaded.

media/image/    scans of handwritten digits (PNG)
media/video/    the written digit wandering over the sheet (MP4, 3 s)
media/audio/    the digit's key on a telephone, with noise (WAV, DTMF of ITU-T Q.23)
media/depth/    a relief of the digit on a wall (16-bit PNG, millimetres)
media/thermal/  a warm imprint of it (PNG, white is hot)
media/imu/      a hand that taps the digit out, zero is ten taps (CSV, 100 rows a second)
                A number stands for the same digit in every folder. train-* is for training,
                heldout-* is never trained on; its digits are in eval/contexts.jsonl.
train/captions.json       stage 1: images and captions (LLaVA's format)
train/instructions.json   stage 2: images and conversations (conv, detail, complex)
eval/questions-*.jsonl    questions about held-out files, by modality, with right answers
eval/answers-reference-*  the right answers as answer records, to review against
eval/contexts.jsonl       what the held-out files show, for judges
llama/                    a small LLaMA that has only ever read text about digits
imagebind/                a small ImageBind: every modality bound to images
imagebind-unbound/        the same image tower; the towers of audio, depth, thermal and IMU were
                          never trained. What they still get right is chance: 10 %, give or
                          take, since such a tower can put a whole digit near one mean or another
{pe_av}stage1/                   the projector, trained on the captions
model/                    llama with that projector, trained on the instructions: a ChatBind model
delta/                    model minus llama
eval/answers-model-audio.jsonl  what it says to eval/questions-audio.jsonl; it has never heard
eval/reviews-audio.jsonl        a sound in training. And how right that is
toy.json                  seed, versions, and the figures below

Held-out files that lie nearest to the mean of the images of their own digit
----------------------------------------------------------------------------
{figures}

The model was made by (in this folder)
--------------------------------------
{commands}
Try
---
chatbind ask -m model --audio media/audio/heldout-0000.wav "Which digit is this?"
chatbind ask -m model --chat
chatbind summarize eval/reviews-audio.jsonl
Every command's help has more that works here as it stands: chatbind vqa --help
"""


_PE_AV_TEXT = """\
pe-av/                    a small PE-AV, in the layout of the Hugging Face hub: image, video and
                          audio. Every command takes it as --encoder in place of imagebind
pe-av-unbound/            the same image tower; that of audio was never trained
"""


def _readme(summary: Record) -> str:
    """The text for a world with this `toy.json`."""
    accuracy = summary[_FIGURES]
    names = ["unbound" if name.endswith("-unbound") else name for name in accuracy]
    lines = [f"{'':10}" + "".join(f"{name:>12}" for name in names)]
    for modality in accuracy[_IMAGEBIND]:
        shares = [shares.get(modality) for shares in accuracy.values()]
        cells = ["" if share is None else f"{share:.0%}" for share in shares]
        lines.append((f"{modality:10}" + "".join(f"{cell:>12}" for cell in cells)).rstrip())
    pe_av = _PE_AV_TEXT if _PE_AV in accuracy else ""
    quick = " with --quick: its models have learned nothing" if summary["quick"] else ""
    return _README_TEXT.format(
        seed=summary["seed"],
        quick=quick,
        figures="\n".join(lines),
        commands=_COMMANDS,
        pe_av=pe_av,
    )

"""What the program itself makes of a toy world: a trained model, its answers, their review.

The commands are those that a user would type in the world's folder, and its `README.txt`, which is
here, too, shows them.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from chatbind_cli import launch
from chatbind_cli.jsonl import Record

ANSWERS = "eval/answers-model-audio.jsonl"
REVIEWS = "eval/reviews-audio.jsonl"
COMMANDS = f"""\
chatbind pretrain -m llama --encoder imagebind --data train/captions.json --media-root media \\
    --learning-rate 1e-2 --num-train-epochs 2 --gradient-accumulation-steps 1 -o stage1
chatbind finetune -m llama --projector stage1/projector.safetensors \\
    --encoder imagebind --store stage1/embeddings --data train/instructions.json \\
    --learning-rate 1e-3 --num-train-epochs 1 --per-device-train-batch-size 16 \\
    --gradient-accumulation-steps 1 -o model
chatbind make-delta --base llama --target model --delta delta
chatbind vqa -m model -q eval/questions-audio.jsonl --media-root media --max-new-tokens 32 \\
    -o {ANSWERS}
chatbind review --question eval/questions-audio.jsonl --judge rule \\
    --answer-list eval/answers-reference-audio.jsonl {ANSWERS} \\
    -o {REVIEWS}
"""

_STAGES = ("pretrain", "finetune")

# So that the same seed gives the same model on every machine.
_REPEATABLE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "CHATBIND_QUIET": "1"}


def make_sequel(folder: Path, *, seed: int, quick: bool) -> None:
    """Runs the commands in a world's folder; what they have finished before is left as it is.

    Args:
        folder: of the world.
        seed: of the order of training.
        quick: take two steps of training only.

    Raises:
        ChatBindError: one of them failed.
    """
    for line in COMMANDS.replace("\\\n", "").splitlines():
        words = shlex.split(line)[1:]
        if words[0] in _STAGES:
            words += ["--seed", str(seed), *(["--max-steps", "2"] if quick else [])]
        launch.run_apart(words, folder=folder, environment=_REPEATABLE)


_README = """\
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
stage1/                   the projector, trained on the captions
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


def readme(summary: Record) -> str:
    """The text for a world with this `toy.json`."""
    accuracy = summary["nearest_class_mean_accuracy"]
    lines = [f"{'':10}{'imagebind':>12}{'unbound':>12}"]
    for modality, share in accuracy["imagebind"].items():
        other = accuracy["imagebind-unbound"][modality]
        lines.append(f"{modality:10}{share:>12.0%}{other:>12.0%}")
    quick = " with --quick: its models have learned nothing" if summary["quick"] else ""
    return _README.format(
        seed=summary["seed"], quick=quick, figures="\n".join(lines), commands=COMMANDS
    )

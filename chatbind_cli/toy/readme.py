"""The README.txt of a toy world: what is there, how good its encoder is, what to try."""

from __future__ import annotations

from chatbind_cli.jsonl import Record
from chatbind_cli.toy.sequel import COMMANDS

_TEXT = """\
A toy world for ChatBind: the ten digits in six senses
======================================================

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
imagebind/                a small ImageBind: every sense bound to images
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
    return _TEXT.format(
        seed=summary["seed"], quick=quick, figures="\n".join(lines), commands=COMMANDS
    )

"""The README.txt of a toy world: what is there, how good its encoder is, what to try."""

from __future__ import annotations

from chatbind_cli.jsonl import Record

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
toy.json                  seed, versions, and the figures below

Held-out files that lie nearest to the mean of the images of their own digit
----------------------------------------------------------------------------
{figures}

Try (in this folder)
--------------------
chatbind pretrain -m llama --encoder imagebind --data train/captions.json --media-root media \\
    --learning-rate 1e-2 --gradient-accumulation-steps 1 -o out/stage1
chatbind extract-projector out/stage1 -o out/projector.safetensors
chatbind finetune -m llama --projector out/projector.safetensors --encoder imagebind \\
    --data train/instructions.json --media-root media --learning-rate 1e-3 \\
    --num-train-epochs 1 --per-device-train-batch-size 16 --gradient-accumulation-steps 1 \\
    -o out/model
chatbind ask -m out/model --audio media/audio/heldout-0000.wav "Which digit is this?"
chatbind vqa -m out/model -q eval/questions-audio.jsonl --media-root media -o out/audio.jsonl
"""


def readme(summary: Record) -> str:
    """The text for a world with this `toy.json`."""
    accuracy = summary["nearest_class_mean_accuracy"]
    lines = [f"{'':10}{'imagebind':>12}{'unbound':>12}"]
    for modality, share in accuracy["imagebind"].items():
        other = accuracy["imagebind-unbound"][modality]
        lines.append(f"{modality:10}{share:>12.0%}{other:>12.0%}")
    quick = " with --quick: its models have learned nothing" if summary["quick"] else ""
    return _TEXT.format(seed=summary["seed"], quick=quick, figures="\n".join(lines))

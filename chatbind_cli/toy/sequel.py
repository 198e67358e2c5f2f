"""What the program itself makes of a toy world: a trained model, its answers, their review.

The commands are those that a user would type in the world's folder, and `README.txt` shows them.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from chatbind_cli import launch

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

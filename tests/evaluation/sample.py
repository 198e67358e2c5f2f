"""A small world of all six modalities with answers and reviews, for the tests of the report."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from chatbind_cli.evaluation.cases import Case, Judgement
from chatbind_cli.evaluation.summary import Summary, summarize

NASTY = (
    "</div></details><script>window.owned = 1</script><img src=x onerror='window.owned = 2'>"
    "<svg onload='window.owned = 3'><a href=\"javascript:window.owned = 4\">{{ 7*7 }}</a>"
)
FILES = {
    "image": "dog.jpg",
    "audio": "tone.wav",
    "video": "square.mp4",
    "depth": "room.png",
    "thermal": "hand.png",
    "imu": "walk.csv",
}


def make_media(folder: Path) -> None:
    """One file a modality."""
    import av

    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[0:60, 0:80]
    colours = np.stack([x * 3, y * 4, x + y], axis=-1).astype(np.uint8)
    Image.fromarray(colours).save(folder / "dog.jpg")
    depth = (500 + 20 * x + 10 * y).astype(np.uint16)
    depth[:10, :10] = 0  # nothing was measured there
    Image.fromarray(depth).save(folder / "room.png")
    Image.fromarray((2 * x + y).astype(np.uint8)).save(folder / "hand.png")
    with wave.open(str(folder / "tone.wav"), "wb") as sound:
        sound.setnchannels(2)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        tone = 8000 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
        sound.writeframes(np.repeat(tone.astype("<i2"), 2).tobytes())
    with av.open(str(folder / "square.mp4"), "w") as film:
        stream = film.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 960, 540, "yuv420p"
        for i in range(30):
            picture = np.zeros((540, 960, 3), np.uint8)
            picture[100:200, 10 * i : 10 * i + 100] = 255
            film.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        film.mux(stream.encode(None))
    seconds = np.arange(0, 5, 0.02)
    rows = [f"{t:.2f},{np.sin(t):.3f},0,9.81,0.1,{np.cos(t):.3f},0" for t in seconds]
    header = "timestamp,acc_x,acc_y,acc_z,gyro_x,gyro_y,gyro_z"
    (folder / "walk.csv").write_text("\n".join([header, *rows]) + "\n")


def questions() -> dict[str, dict[str, Any]]:
    """One question a modality, and one about a file that is not there."""
    found = {}
    for number, (modality, name) in enumerate({**FILES, "": "gone.jpg"}.items()):
        category = ("conv", "detail")[number % 2]
        question = {"question_id": number, "text": f"What is in number {number}?"}
        found[str(number)] = {**question, modality or "image": name, "category": category}
    found["3"]["text"] = NASTY
    return found


def answers() -> list[dict[str, dict[str, Any]]]:
    """Two answers a question; one of them would like to run."""
    first = {key: {"text": f"A dog, says {key}.", "model_id": "ref"} for key in questions()}
    second = {key: {"text": f"A cat, says {key}.", "model_id": "toy"} for key in questions()}
    second["2"]["text"] = NASTY
    return [first, second]


def reviews() -> list[dict[str, Any]]:
    """Both orders of each question: the first better, a tie, the second better, one undecided."""
    scores = [
        ([8, 6], [9, 6]),
        ([7, 7], [7, 7]),
        ([5, 8], [6, 8]),
        ([8, 7], [7, 8]),
        ([8, 5], [8, 5]),
        (None, None),
        ([4, 9], [9, 4]),
    ]
    found = []
    for (key, question), pairs in zip(questions().items(), scores, strict=True):
        modality = next(name for name in FILES if name in question)
        for order, pair in zip(([1, 2], [2, 1]), pairs, strict=True):
            metadata = {"order": order, "modality": modality, "models": ["ref", "toy"]}
            review = {"question_id": int(key), "category": question["category"], "tuple": pair}
            review |= {"content": f"{NASTY} judge on {key}", "reviewer_id": "judge"}
            review["metadata"] = {**metadata, "slot": f"{key} {order}"}
            if pair is None:
                review["error"] = f"no scores {NASTY}"
            found.append(review)
    return found


def judgement(case: Case, *, swapped: bool = False, sample: int = 0) -> Judgement:
    """One judgement of a case, by a judge called `m`."""
    return Judgement(case=case, swapped=swapped, sample=sample, judge="m", judge_hash="h")


def one_summary(records: list[dict[str, Any]], **options: Any) -> Summary:
    """The figures of reviews of one pair of answer files, with the judges' words."""
    (summary,) = summarize(records, with_words=True, **options)
    return summary

"""Does noise on embeddings carry a projector over to modalities it was not trained on?

    python benchmarks/transfer.py                      # five seeds: ten minutes on two cores
    python benchmarks/transfer.py --seeds 1 --quick    # does it run?

In the toy world: encoders whose other towers were bound to images only weakly; for each, `pretrain`
on images alone with noise of several strengths, or with every modality centred by its own mean
(taken from media without labels), or both; then "Which digit is this?" about held-out media of all
modalities. A line a run and modality has the share of right answers beside R@1 (from the
modality's media to the images) and the distance of the means (gap), both of which are known before
any training. The last lines are means over the seeds; `gain` is over the plain runs of the same
seeds, with its standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from chatbind_cli.cli import run
from chatbind_cli.data.lookup import Embeddings, open_stores, part_name
from chatbind_cli.data.pairs import EncodedPairs, retrieval
from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.loaded_model import load_model
from chatbind_cli.inference.media_encoder import StoredEmbeddings
from chatbind_cli.inference.questions import Question
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.root import MediaRoot
from chatbind_cli.toy.digits import NAMES, Item, load_items
from chatbind_cli.toy.encoders import make_encoders
from chatbind_cli.toy.fit import FULL, QUICK, Size
from chatbind_cli.toy.imagebind import ToyImageBind
from chatbind_cli.toy.language import make_language_model
from chatbind_cli.toy.media import SUFFIXES, relative_path, write_media
from chatbind_cli.toy.texts import question, write_records
from chatbind_cli.training.embeddings import encode_media

NOISE = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
MODALITIES = tuple(SUFFIXES)
HELDOUT = 200  # of every modality
FOR_MEANS = 100  # media of a modality that its mean is taken from
EPOCHS = {"audio": 2, "depth": 4, "thermal": 4, "imu": 8}
"""Passes that bind a tower: about a third of the toy world's."""


@dataclass(frozen=True)
class World:
    """Where everything lies, and how large it is."""

    folder: Path
    size: Size
    steps: int
    heldout: int

    @property
    def items(self) -> tuple[list[Item], list[Item]]:
        """Those for training and the held-out ones."""
        train, heldout = load_items()
        return train[: self.size.train_items["image"]], heldout[: self.heldout]

    def place(self, seed: int) -> Path:
        """The folder of what a seed makes."""
        return self.folder / f"seed-{seed}"


@dataclass(frozen=True)
class Condition:
    """What is done about the gap."""

    noise: float
    centred: bool = False

    @property
    def name(self) -> str:
        """For a folder."""
        return f"run-{'centred-' * self.centred}noise-{self.noise:g}"


def media_of(items: Iterable[Item], modality: str) -> list[Medium]:
    """The files that show some digits."""
    return [Medium(modality, relative_path(item, modality)) for item in items]


def make_world(world: World) -> None:
    """The media, the texts and the language model, which all seeds share."""
    train, heldout = world.items
    for modality, count in world.size.train_items.items():
        write_media([*train[:count], *heldout], modality, world.folder / "media", seed=0)
    write_records(train, heldout, world.folder, seed=0)
    steps = world.size.language_steps
    make_language_model(world.folder / "llama", steps, 0, lambda step, loss: None)


def make_stores(world: World, seed: int) -> list[dict[str, Any]]:
    """Encoders of a seed, and the embeddings by them: as they are, and centred.

    Returns:
        A record a modality: how well its held-out media find the images of the same digit.
    """
    torch.set_num_threads(1)
    place, media = world.place(seed), world.folder / "media"
    train, heldout = world.items
    folders = (place / "imagebind", place / "unbound")
    make_encoders(ToyImageBind, train, media, folders, world.size, seed, lambda *said: None)
    encoder, options = open_encoder(folders[0]), MediaOptions()
    for_means = {
        m: media_of(train[: min(FOR_MEANS, world.size.train_items[m])], m) for m in MODALITIES
    }
    wanted = [*media_of(train, "image"), *(m for some in for_means.values() for m in some)]
    wanted += [medium for modality in MODALITIES for medium in media_of(heldout, modality)]
    wanted = list(dict.fromkeys(wanted))
    plain = place / "plain"
    failed = encode_media(wanted, encoder, MediaRoot(media), plain / part_name(0), options)
    assert not failed, failed
    stores = open_stores(plain)
    embeddings = Embeddings(stores)
    means = {m: unit(embeddings, some).mean(dim=0) for m, some in for_means.items()}
    made = replace(stores[0].meta, dtype="float32")
    with EmbeddingStore.open(place / "centred", "a", **vars(made)) as store:
        for number, (medium, row) in enumerate(zip(wanted, unit(embeddings, wanted), strict=True)):
            modality = str(medium.modality)
            made_as = options.fingerprint(modality)
            moved = row - means[modality]
            store.add(medium.name, modality, f"{number:064x}", made_as, moved)
    digits = torch.tensor([item.digit for item in heldout])
    found = []
    images = unit(embeddings, media_of(heldout, "image"))
    for modality in MODALITIES[1:]:
        rows = unit(embeddings, media_of(heldout, modality))
        said = retrieval(EncodedPairs(("image", modality), images, rows, digits))
        kept = ("recall_back_at_1", "chance_at_1", "gap", "outlook")
        found.append({"seed": seed, "modality": modality, **{key: said[key] for key in kept}})
    return found


def unit(embeddings: Embeddings, media: Sequence[Medium]) -> torch.Tensor:
    """Embeddings [media, d] of norm 1."""
    rows = embeddings.rows(media)
    assert rows is not None
    return functional.normalize(rows, dim=-1)


def accuracies(world: World, seed: int, condition: Condition) -> dict[str, float]:
    """Trains a projector on images alone; the share of right answers by modality."""
    torch.set_num_threads(1)
    place = world.place(seed)
    out, store = place / condition.name, place / ("centred" if condition.centred else "plain")
    words = ["pretrain", "-m", world.folder / "llama", "--store", store, "-o", out]
    words += ["--data", world.folder / "train/captions.json", "--seed", seed, "--device", "cpu"]
    words += ["--learning-rate", "1e-2", "--max-steps", world.steps, "--save-strategy", "no"]
    words += ["--gradient-accumulation-steps", 1, "--embedding-noise", condition.noise]
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        code, problem = run(list(map(str, words)))
    assert code == 0, problem
    projector = out / "projector.safetensors"
    loaded = load_model(world.folder / "llama", projector=projector, device="cpu")
    answerer = Answerer(loaded, StoredEmbeddings([store], loaded, MediaOptions()))
    settings = GenerationSettings(max_new_tokens=16)
    asked = question("which").wordings[0]
    _, heldout = world.items
    right = {}
    for modality in MODALITIES:
        questions = [Question(asked, (medium,)) for medium in media_of(heldout, modality)]
        answers = [
            answer.text
            for start in range(0, len(questions), 100)
            for answer in answerer.generate(
                answerer.prepare(questions[start : start + 100]), settings
            )
        ]
        hits = [named(text) == item.digit for text, item in zip(answers, heldout, strict=True)]
        right[modality] = sum(hits) / len(hits)
    return right


def named(answer: str) -> int | None:
    """The digit that an answer names, if it names one and no other."""
    words = answer.lower().replace(".", " ").replace(",", " ").split()
    found = {number for number, name in enumerate(NAMES) if name in words}
    return found.pop() if len(found) == 1 else None


def summary(runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Means over seeds, and gains over plain runs."""
    by: dict[tuple[float, bool, str], dict[int, float]] = {}
    for one in runs:
        key = one["noise"], one["centred"], one["modality"]
        by.setdefault(key, {})[one["seed"]] = one["accuracy"]
    for (noise, centred, modality), found in by.items():
        plain = by[0.0, False, modality]
        gains = [found[seed] - plain[seed] for seed in found]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        yield {
            "noise": noise,
            "centred": centred,
            "modality": modality,
            "seeds": len(found),
            "mean_accuracy": round(statistics.mean(found.values()), 4),
            "gain": round(statistics.mean(gains), 4),
            "gain_error": round(error, 4),
        }


def show(record: dict[str, Any]) -> None:
    """Prints a record."""
    print(json.dumps({"benchmark": "transfer", **record}), flush=True)


def measure(world: World, seeds: int, processes: int) -> None:
    """All runs, as many at a time as there are processes."""
    conditions = [*map(Condition, NOISE), Condition(0.0, centred=True), Condition(1.0, True)]
    runs: list[dict[str, Any]] = []
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        known: dict[tuple[int, str], dict[str, Any]] = {}
        for found in pool.map(partial(make_stores, world), range(seeds)):
            for record in found:
                show(record)
                known[record["seed"], record["modality"]] = record
        tasks = [(seed, condition) for seed in range(seeds) for condition in conditions]
        results = pool.map(partial(accuracies, world), *zip(*tasks, strict=True))
        for (seed, condition), right in zip(tasks, results, strict=True):
            for modality, accuracy in right.items():
                told = known.get((seed, modality), {})
                record = {
                    "seed": seed,
                    "noise": condition.noise,
                    "centred": condition.centred,
                    "modality": modality,
                    "accuracy": accuracy,
                    **{key: told[key] for key in ("recall_back_at_1", "gap") if key in told},
                }
                runs.append(record)
                show(record)
    for record in summary(runs):
        show(record)


def main() -> None:
    """Makes the world and measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="nothing is learned: does it run?")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one by default")
    asked = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "CHATBIND_QUIET": "1"}
    size = QUICK if asked.quick else replace(FULL, bind_epochs=EPOCHS)
    with contextlib.ExitStack() as stack:
        folder = asked.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        steps, heldout = (2, 10) if asked.quick else (200, HELDOUT)
        world = World(folder, size, steps, heldout)
        make_world(world)
        measure(world, asked.seeds, asked.processes)


if __name__ == "__main__":
    main()

"""Makes the toy world's encoders from its media files, and measures them on held-out files.

Files go through the very loaders that every other command uses, so what a tower learned from is
what it will be shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from chatbind_cli.device import one_thread
from chatbind_cli.encoders.encoder import Decoded, Encoder, Read, load_media
from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.toy.binding import Samples, ToyEncoder, bind, embed, train_image_tower
from chatbind_cli.toy.digits import NAMES, Item
from chatbind_cli.toy.fit import Size, repeatable
from chatbind_cli.toy.media import SUFFIXES, relative_path

# Enough for the mean of each digit to be known within a few hundredths.
_ITEMS_FOR_MEANS = 300

# Decoding files leaves Python's lock often enough for two at a time.
_LOADERS = 2


def make_encoders(
    kind: Callable[[], ToyEncoder],
    items: Sequence[Item],
    media: Path,
    folders: tuple[Path, Path],
    size: Size,
    seed: int,
    report: Callable[[str, int, float], None],
) -> None:
    """Trains an encoder and writes it, and another one that was never bound.

    Args:
        kind: makes one that is untrained.
        items: training items.
        media: folder of the media files.
        folders: of the bound encoder, which is written last, and of the other one: the same image
            tower, and the towers of the other modalities as they were before training.
        size: how many files and epochs.
        seed: of weights and batches.
        report: told a tower's name, the step and the loss; see `fit`.
    """
    bound, unbound = folders
    with repeatable(seed):
        encoder = kind()
    encoder.save(unbound)  # what lies beside the weights may say how media are read
    read = open_encoder(unbound).read
    samples_of = partial(_samples, encoder, read, items, media, size)
    images = samples_of("image")
    with repeatable(seed + 1) as generator:
        image_tower = encoder.tower("image")
        train_image_tower(
            image_tower,
            images,
            samples_of("video"),
            epochs=encoder.epochs_factor * size.image_epochs,
            generator=generator,
            report=partial(report, "image"),
        )
        embedded = Samples(embed(image_tower, images.tensors), images.digits)
    encoder.save(unbound)
    for number, modality in enumerate(encoder.bound, start=2):
        samples = samples_of(modality)
        with repeatable(seed + number) as generator:
            bind(
                encoder.tower(modality),
                modality,
                samples,
                embedded,
                epochs=encoder.epochs_factor * size.bind_epochs[modality],
                generator=generator,
                report=partial(report, modality),
            )
    encoder.save(bound)


def measure(
    train: Sequence[Item], heldout: Sequence[Item], media: Path, folders: Sequence[Path]
) -> dict[str, dict[str, float]]:
    """Accuracies of saved encoders by the nearest class mean of the training images.

    Args:
        train: the images' items.
        heldout: what is measured.
        media: folder of the media files.
        folders: encoders of one kind.

    Returns:
        By encoder and modality: the share of held-out files that lie nearest to the mean of the
        images of their own digit.
    """
    digits = torch.tensor([item.digit for item in heldout])
    train = train[:_ITEMS_FOR_MEANS]
    train_digits = torch.tensor([item.digit for item in train])
    encoders = [open_encoder(folder) for folder in folders]
    accuracy: dict[str, dict[str, float]] = {folder.name: {} for folder in folders}
    with one_thread():
        images = _embed_files(train, "image", media, encoders)
        means = [class_means(part, train_digits) for part in images]
        for modality in (name for name in SUFFIXES if name in encoders[0].modalities):
            rows = _embed_files(heldout, modality, media, encoders)
            for shares, part, mean in zip(accuracy.values(), rows, means, strict=True):
                share = nearest_mean_accuracy(part, digits, mean)
                shares[modality] = round(share, 4)
    return accuracy


def _samples(
    encoder: ToyEncoder,
    read: Read,
    items: Sequence[Item],
    media: Path,
    size: Size,
    modality: str,
) -> Samples:
    """The training recordings of a modality, as the towers learn from them."""
    chosen = items[: size.train_items[modality]]
    with one_thread():
        tensors = [
            encoder.prepare(medium.tensor, modality)
            for medium in _load(chosen, modality, media, read)
        ]
    return Samples(torch.stack(tensors), torch.tensor([item.digit for item in chosen]))


def _embed_files(
    items: Sequence[Item], modality: str, media: Path, encoders: Sequence[Encoder]
) -> list[torch.Tensor]:
    """The files' embeddings [n, d] by each encoder; a file is read once."""
    rows = [
        [encoder.embed([medium], normalize=True)[0] for encoder in encoders]
        for medium in _load(items, modality, media, encoders[0].read)
    ]
    return [torch.stack(part) for part in zip(*rows, strict=True)]


def _load(items: Sequence[Item], modality: str, media: Path, read: Read) -> Iterator[Decoded]:
    """Media in order, read a little ahead."""
    paths = [media / relative_path(item, modality) for item in items]
    with ThreadPoolExecutor(_LOADERS) as pool:
        for start in range(0, len(paths), 4 * _LOADERS):
            part = paths[start : start + 4 * _LOADERS]
            yield from pool.map(partial(load_media, read, modality=modality), part)


def class_means(embeddings: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
    """Where each digit lies on average, [10, d], of norm 1."""
    means = [embeddings[digits == digit].mean(dim=0) for digit in range(len(NAMES))]
    return F.normalize(torch.stack(means), dim=-1)


def nearest_mean_accuracy(
    embeddings: torch.Tensor, digits: torch.Tensor, means: torch.Tensor
) -> float:
    """The share of embeddings [n, d] that lie nearest to the mean [10, d] of their own digit."""
    return float(((embeddings @ means.T).argmax(dim=1) == digits).float().mean())

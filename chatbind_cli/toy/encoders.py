"""Makes the toy world's two encoders from its media files, and measures them on held-out files.

Files go through the very loaders that every other command uses, so what a tower learned from is
what it will be shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from chatbind_cli.encoders.imagebind.encoder import Encoder, load_encoder, save_encoder
from chatbind_cli.encoders.imagebind.model import ImageBind
from chatbind_cli.encoders.imagebind.preprocess import Decoded, load_media
from chatbind_cli.toy import towers
from chatbind_cli.toy.cells import COARSE, to_cells
from chatbind_cli.toy.digits import Item
from chatbind_cli.toy.fit import Report, Size, fixed_threads, repeatable
from chatbind_cli.toy.media import SUFFIXES, relative_path
from chatbind_cli.toy.towers import Samples

# Enough for the mean of each digit to be known within a few hundredths.
_ITEMS_FOR_MEANS = 300

# Decoding files leaves Python's lock often enough for two at a time.
_LOADERS = 2


def train_encoder(
    items: Sequence[Item],
    media: Path,
    folder: Path,
    unbound_folder: Path,
    *,
    size: Size,
    seed: int,
    report: Callable[[str], Report],
) -> None:
    """Trains and writes the bound encoder, and the one whose towers but the image tower are new.

    Args:
        items: training items.
        media: folder of the media files.
        folder: of the bound encoder.
        unbound_folder: of the encoder that was never bound: the same image tower, and the towers
            of the other modalities as they were before training.
        size: how many files and epochs.
        seed: of weights and batches.
        report: gives the `fit.Report` for a tower's name.
    """
    with repeatable(seed):
        whole = towers.new_model(("image", *towers.BOUND))
        untrained = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    images = _samples(items, "image", media, size)
    with repeatable(seed + 1) as generator:
        image_tower = towers.train_image_tower(
            whole,
            images,
            _samples(items, "video", media, size),
            epochs=size.image_epochs,
            generator=generator,
            report=report("image"),
        )
        targets = towers.embed(image_tower, images.tensors)
    for number, modality in enumerate(towers.BOUND, start=2):
        samples = _samples(items, modality, media, size)
        with repeatable(seed + number) as generator:
            towers.bind(
                whole,
                modality,
                samples,
                targets,
                images.digits,
                epochs=size.bind_epochs[modality],
                generator=generator,
                report=report(modality),
            )
    save_encoder(whole, towers.CONFIG, folder)
    save_encoder(_with_image_tower_of(whole, untrained), towers.CONFIG, unbound_folder)


def measure(
    train: Sequence[Item], heldout: Sequence[Item], media: Path, folders: dict[str, Path]
) -> dict[str, dict[str, float]]:
    """Accuracies of saved encoders by the nearest class mean of the training images.

    Args:
        train: items whose images give the means.
        heldout: items to tell.
        media: folder of the media files.
        folders: encoders by name.

    Returns:
        By encoder and modality: the share of held-out files that lie nearest to the mean of the
        images of their own digit.
    """
    digits = torch.tensor([item.digit for item in heldout])
    train = train[:_ITEMS_FOR_MEANS]
    train_digits = torch.tensor([item.digit for item in train])
    encoders = {name: load_encoder(folder) for name, folder in folders.items()}
    accuracy: dict[str, dict[str, float]] = {name: {} for name in encoders}
    with fixed_threads():
        rows = list(_embed_files(train, "image", media, list(encoders.values())))
        means = [
            towers.class_means(torch.stack(part), train_digits) for part in zip(*rows, strict=True)
        ]
        for modality in SUFFIXES:
            rows = list(_embed_files(heldout, modality, media, list(encoders.values())))
            for name, part, mean in zip(encoders, zip(*rows, strict=True), means, strict=True):
                share = towers.nearest_mean_accuracy(torch.stack(part), digits, mean)
                accuracy[name][modality] = round(share, 4)
    return accuracy


def _samples(items: Sequence[Item], modality: str, media: Path, size: Size) -> Samples:
    """The training recordings of a modality, as the towers learn from them."""
    chosen = items[: size.train_items[modality]]

    def tensor(medium: Decoded) -> torch.Tensor:
        return to_cells(medium.tensor) if modality in COARSE else medium.tensor

    with fixed_threads():
        tensors = [tensor(medium) for medium in _load(chosen, modality, media)]
    return Samples(torch.stack(tensors), torch.tensor([item.digit for item in chosen]))


def _embed_files(
    items: Iterable[Item], modality: str, media: Path, encoders: Sequence[Encoder]
) -> Iterator[list[torch.Tensor]]:
    """For each file its embedding by every encoder; a file is read once."""
    for medium in _load(items, modality, media):
        yield [encoder.embed([medium], normalize=True)[0] for encoder in encoders]


def _load(items: Iterable[Item], modality: str, media: Path) -> Iterator[Decoded]:
    """Media in order, read a little ahead."""
    chosen = list(items)
    with ThreadPoolExecutor(_LOADERS) as pool:
        for start in range(0, len(chosen), 4 * _LOADERS):
            part = chosen[start : start + 4 * _LOADERS]
            paths = [media / relative_path(item, modality) for item in part]
            yield from pool.map(load_media, paths, [modality] * len(paths))


def _with_image_tower_of(trained: ImageBind, weights: dict[str, torch.Tensor]) -> ImageBind:
    """The untrained model, but for the image tower."""
    kept = {name: t for name, t in trained.state_dict().items() if ".vision." in name}
    with repeatable(0):
        model = towers.new_model(("image", *towers.BOUND))
    model.load_state_dict({**weights, **kept})
    return model

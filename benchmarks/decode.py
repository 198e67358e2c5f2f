"""Pictures a second that decoding gives, in threads and in processes.

    python benchmarks/decode.py [--pictures 600] [--workers 1 2 4 8]

Photographs of 640x480 (JPEG, noise over gradients: about 100 kB), read, hashed, decoded and
transformed as for the encoder, whose place something takes that does no work. ViT-Huge on one H200
wants 750 to 1,250 a second. Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from chatbind_cli.data.decoders import DecodeIn
from chatbind_cli.data.encoding import EncodingOptions, encode_items
from chatbind_cli.data.media_items import MediaItem
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.options import MediaOptions

DIFFERENT = 40  # files; each is read many times
BATCH = 32
PLACES: tuple[DecodeIn, ...] = ("threads", "processes")


def write_pictures(folder: Path) -> list[Path]:
    """Pictures that compress about as photographs do."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:480, 0:640]
    paths = [folder / f"{number}.jpg" for number in range(DIFFERENT)]
    for path in paths:
        slope = random.uniform(-0.4, 0.4, (2, 3))
        smooth = 128 + np.stack([a * (x - 320) + b * (y - 240) for a, b in slope.T], axis=-1)
        noisy = smooth + random.normal(0, 12, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def rate(paths: list[Path], pictures: int, workers: int, where: DecodeIn) -> float:
    """Pictures a second once all that decode have begun."""

    def embed(media: list[Any], *, normalize: bool) -> torch.Tensor:
        return torch.ones(len(media), 1)

    encoder: Any = SimpleNamespace(modalities=("image",), embed=embed)
    how = EncodingOptions(media=MediaOptions(), workers=workers, batch_size=BATCH, decode_in=where)
    warm = 4 * workers + BATCH
    items = [
        MediaItem(Medium("image", paths[number % len(paths)])) for number in range(warm + pictures)
    ]
    begun = 0.0
    for number, result in enumerate(encode_items(iter(items), encoder, how)):
        assert result.error is None, result.error
        if number == warm:
            begun = time.perf_counter()
    return pictures / (time.perf_counter() - begun)


def main() -> None:
    """Measures all numbers of workers in both places."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=600)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder))
        size = sum(path.stat().st_size for path in paths) // len(paths)
        for workers in asked.workers:
            for where in PLACES:
                found = {"workers": workers, "in": where, "cores": os.cpu_count(), "bytes": size}
                found["pictures_per_s"] = round(rate(paths, asked.pictures, workers, where), 1)
                print(json.dumps({"benchmark": "decode", **found}), flush=True)


if __name__ == "__main__":
    main()

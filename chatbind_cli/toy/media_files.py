"""Writes the toy world's media: one file an item and sense, in formats that other programs read.

Every file depends on the seed, its sense and its item alone, so any part can be made again. Knows
nothing of how the loaders turn the files into tensors.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from chatbind_cli.toy import senses
from chatbind_cli.toy.digits import Item

SUFFIXES = {
    "image": ".png",
    "video": ".mp4",
    "audio": ".wav",
    "depth": ".png",
    "thermal": ".png",
    "imu": ".csv",
}


def relative_path(item: Item, modality: str) -> str:
    """Where an item's file of a modality lies, below the media folder."""
    return f"{modality}/{item.stem}{SUFFIXES[modality]}"


def write_media(
    items: Iterable[Item],
    modality: str,
    folder: Path,
    *,
    seed: int,
    count: Callable[[], None] = lambda: None,
) -> None:
    """Writes the files of one modality.

    Args:
        items: what to show.
        modality: in which sense.
        folder: the media folder; the modality's own folder is made below it.
        seed: of the whole world.
        count: called after each file.
    """
    (folder / modality).mkdir(parents=True, exist_ok=True)
    for item in items:
        data = media_bytes(item, modality, seed=seed)
        (folder / relative_path(item, modality)).write_bytes(data)
        count()


def media_bytes(item: Item, modality: str, *, seed: int) -> bytes:
    """The file of an item in one modality."""
    # The modality's place in the table and the split tell the streams of random numbers apart.
    stream = (seed, list(SUFFIXES).index(modality), item.split == "heldout", item.number)
    return _ENCODERS[modality](item, np.random.default_rng(stream))


def _image(item: Item, rng: senses.Random) -> bytes:
    return _png(senses.picture(item.scan, rng))


def _thermal(item: Item, rng: senses.Random) -> bytes:
    return _png(senses.imprint(item.scan, rng))


def _depth(item: Item, rng: senses.Random) -> bytes:
    return _png(senses.relief(item.scan, rng))


def _audio(item: Item, rng: senses.Random) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(senses.SOUND_RATE_HZ)
        file.writeframes(senses.tone(item.digit, rng).astype("<i2").tobytes())
    return buffer.getvalue()


def _imu(item: Item, rng: senses.Random) -> bytes:
    rows = senses.taps(item.digit, rng)
    lines = [",".join(("time_s", *senses.IMU_COLUMNS))]
    pattern = "%.2f," + ",".join(["%.3f"] * len(senses.IMU_COLUMNS))
    lines += [pattern % (n / senses.TAPS_RATE_HZ, *row) for n, row in enumerate(rows.tolist())]
    return ("\n".join(lines) + "\n").encode()


def _video(item: Item, rng: senses.Random) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=senses.FILM_FRAMES_PER_SECOND)
        stream.width, stream.height = senses.FILM_WIDTH, senses.FILM_HEIGHT
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, senses.FILM_FRAMES_PER_SECOND)
        # One thread: x264 divides a frame among its threads, and the bytes would depend on them.
        stream.codec_context.thread_count = 1
        # Its hand-written assembly gives other bytes now and then, even in the same process.
        stream.options = {"preset": "veryfast", "crf": "23", "x264-params": "asm=0"}
        for grey in senses.film(item.scan, rng):
            frame = av.VideoFrame.from_ndarray(grey, format="gray")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def _png(levels: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()


_ENCODERS: dict[str, Callable[[Item, senses.Random], bytes]] = {
    "image": _image,
    "video": _video,
    "audio": _audio,
    "depth": _depth,
    "thermal": _thermal,
    "imu": _imu,
}

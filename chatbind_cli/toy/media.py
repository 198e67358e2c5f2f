"""The toy world's media: a digit as a picture, a film, a tone, a relief, an imprint and taps.

Each is drawn in physical units from an item's scan or digit and random numbers, and written in a
format that other programs read. Every file depends on the seed, its modality and its item alone, so
any part can be made again.
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

from chatbind_cli.toy.digits import Item

FloatArray = npt.NDArray[np.float32]
Random = np.random.Generator

IMAGE_PIXELS = 64
RELIEF_PIXELS = 112
FILM_WIDTH, FILM_HEIGHT = 80, 64
FILM_FRAMES_PER_SECOND = 8
FILM_FRAMES = 24
SOUND_RATE_HZ = 16_000
SOUND_SECONDS = 2.5
TAPS_RATE_HZ = 100
TAPS_SECONDS = 5.0
IMU_COLUMNS = ("acc_x", "acc_y", "acc_z", "gyro_x", "gyro_y", "gyro_z")

# ITU-T Q.23: the low tone tells the row of the key, the high tone its column.
_ROW_HZ = (697.0, 770.0, 852.0, 941.0)
_COLUMN_HZ = (1209.0, 1336.0, 1477.0)
_KEYS = ("123", "456", "789", "*0#")

_GRAVITY_M_S2 = 9.81
_BEAT_SECONDS = 0.45

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
        modality: in which modality.
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


def _audio(item: Item, rng: Random) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SOUND_RATE_HZ)
        file.writeframes(tone(item.digit, rng).astype("<i2").tobytes())
    return buffer.getvalue()


def _imu(item: Item, rng: Random) -> bytes:
    rows = taps(item.digit, rng)
    lines = [",".join(("time_s", *IMU_COLUMNS))]
    pattern = "%.2f," + ",".join(["%.3f"] * len(IMU_COLUMNS))
    lines += [pattern % (n / TAPS_RATE_HZ, *row) for n, row in enumerate(rows.tolist())]
    return ("\n".join(lines) + "\n").encode()


def _video(item: Item, rng: Random) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FILM_FRAMES_PER_SECOND)
        stream.width, stream.height = FILM_WIDTH, FILM_HEIGHT
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, FILM_FRAMES_PER_SECOND)
        # One thread: x264 divides a frame among its threads, and the bytes would depend on them.
        stream.codec_context.thread_count = 1
        # Its hand-written assembly gives other bytes now and then, even in the same process.
        stream.options = {"preset": "veryfast", "crf": "23", "x264-params": "asm=0"}
        for grey in film(item.scan, rng):
            frame = av.VideoFrame.from_ndarray(grey, format="gray")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def _png(levels: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()


_ENCODERS: dict[str, Callable[[Item, Random], bytes]] = {
    "image": lambda item, rng: _png(picture(item.scan, rng)),
    "video": _video,
    "audio": _audio,
    "depth": lambda item, rng: _png(relief(item.scan, rng)),
    "thermal": lambda item, rng: _png(imprint(item.scan, rng)),
    "imu": _imu,
}


def picture(scan: FloatArray, rng: Random) -> npt.NDArray[np.uint8]:
    """Dark ink on light paper, grey levels [64, 64]."""
    ink = enlarge(scan, IMAGE_PIXELS)
    paper = rng.uniform(0.88, 1.0)
    dark = rng.uniform(0.0, 0.25)
    grain = rng.normal(0.0, 0.01, ink.shape)
    return _grey(paper - ink * (paper - dark) + grain)


def film(scan: FloatArray, rng: Random) -> npt.NDArray[np.uint8]:
    """The written digit wandering over the sheet, grey levels [24, 64, 80], 8 frames a second."""
    size = int(rng.integers(54, 61))
    ink = enlarge(scan, size)
    paper, dark = rng.uniform(0.88, 1.0), rng.uniform(0.0, 0.25)
    angle, turn = rng.uniform(0, 2 * np.pi), rng.choice([-1.0, 1.0])
    frames = np.full((FILM_FRAMES, FILM_HEIGHT, FILM_WIDTH), paper)
    for n in range(FILM_FRAMES):
        phase = angle + turn * 2 * np.pi * n / FILM_FRAMES
        # Sideways only so far that no crop of the frame cuts off more than the digit's margin.
        x = round((FILM_WIDTH - size) / 2 + 5 * np.cos(phase))
        y = round((FILM_HEIGHT - size) / 2 * (1 + 0.95 * np.sin(phase)))
        frames[n, y : y + size, x : x + size] -= ink * (paper - dark)
    return _grey(frames + rng.normal(0.0, 0.01, frames.shape))


def tone(digit: int, rng: Random) -> npt.NDArray[np.int16]:
    """The digit's key on a telephone, pressed again and again over a noisy line: int16 [40000].

    Frequencies are off by up to the 1.5 % that a receiver must accept, and one tone of the pair is
    louder than the other by up to 4 dB. Source: ITU-T Q.23, Q.24.
    """
    row = next(r for r, keys in enumerate(_KEYS) if str(digit) in keys)
    low_hz, high_hz = _ROW_HZ[row], _COLUMN_HZ[_KEYS[row].index(str(digit))]
    time = np.arange(round(SOUND_RATE_HZ * SOUND_SECONDS)) / SOUND_RATE_HZ
    wave = np.zeros_like(time)
    for hz in (low_hz, high_hz):
        heard_hz = hz * rng.uniform(0.985, 1.015)
        gain = 10 ** (rng.uniform(-2, 2) / 20)
        wave += gain * np.sin(2 * np.pi * heard_hz * time + rng.uniform(0, 2 * np.pi))
    press_seconds, rest_seconds = rng.uniform(0.15, 0.35), rng.uniform(0.08, 0.2)
    cycle = (time - rng.uniform(0, 0.2)) % (press_seconds + rest_seconds)
    wave *= cycle < press_seconds
    noise = rng.normal(0.0, 10 ** (-rng.uniform(3, 20) / 20), time.shape)
    peak = rng.uniform(0.05, 0.25)
    return np.clip((wave + noise) * peak * 32767, -32768, 32767).astype(np.int16)


def relief(scan: FloatArray, rng: Random) -> npt.NDArray[np.uint16]:
    """Distance from the camera in millimetres, [112, 112]: the digit stands out of a wall.

    The wall is 1.4 to 1.7 m away and not quite square to the camera; the digit is raised by a
    quarter to a third of that distance.
    """
    shape = enlarge(scan, RELIEF_PIXELS)
    wall_mm = rng.uniform(1400, 1700)
    raised_mm = wall_mm * rng.uniform(1 / 4, 1 / 3)
    across = np.linspace(-0.5, 0.5, RELIEF_PIXELS)
    tilt_mm = wall_mm * (
        rng.uniform(-0.05, 0.05) * across + rng.uniform(-0.05, 0.05) * across[:, None]
    )
    noise_mm = rng.normal(0.0, 4.0, shape.shape)
    return np.rint(wall_mm + tilt_mm - raised_mm * shape + noise_mm).astype(np.uint16)


def imprint(scan: FloatArray, rng: Random) -> npt.NDArray[np.uint8]:
    """What a thermal camera sees after a warm finger wrote the digit: [112, 112], white is hot.

    Heat has spread (blur), part of it is gone (contrast), and the surface is unevenly warm.
    """
    warm = enlarge(_blur(scan, rng.uniform(0.4, 0.6)), RELIEF_PIXELS)
    surface = rng.uniform(0.15, 0.35) + rng.uniform(-0.08, 0.08) * np.linspace(-1, 1, RELIEF_PIXELS)
    warm = surface + rng.uniform(0.4, 0.6) * warm / max(float(warm.max()), 1e-6)
    return _grey(warm + rng.normal(0.0, 0.03, warm.shape))


def taps(digit: int, rng: Random) -> FloatArray:
    """A hand that wears the sensor taps the digit out, as a rotary dial does: zero is ten taps.

    Returns:
        [500, 6]: acceleration x, y, z in m/s^2 (gravity included) and rotation x, y, z in rad/s,
        100 rows a second.
    """
    count = digit or 10
    steps = round(TAPS_RATE_HZ * TAPS_SECONDS)
    time = np.arange(steps) / TAPS_RATE_HZ
    beat_seconds = _BEAT_SECONDS * rng.uniform(0.98, 1.02)
    first_seconds = rng.uniform(0.1, 0.25)
    signal = rng.normal(0.0, [0.15, 0.15, 0.2, 0.03, 0.03, 0.03], (steps, 6))
    pitch, roll = rng.normal(0.0, 0.08, 2)
    signal[:, :3] += _GRAVITY_M_S2 * np.array([-np.sin(pitch), np.sin(roll), np.cos(pitch)])
    for n in range(count):
        since = time - (first_seconds + n * beat_seconds + rng.normal(0, 0.015))
        # The hand is stopped by the table and springs back a little; the wrist turns with it.
        knock = np.exp(-0.5 * (since / 0.03) ** 2) - 0.4 * np.exp(
            -0.5 * ((since - 0.09) / 0.03) ** 2
        )
        strength = rng.uniform(6, 10)
        signal[:, 2] += strength * knock
        signal[:, 0] += 0.3 * strength * knock
        signal[:, 4] += 0.3 * strength * np.exp(-0.5 * ((since + 0.05) / 0.04) ** 2)
    return signal.astype(np.float32)


def enlarge(scan: FloatArray, pixels: int) -> FloatArray:
    """A scan [8, 8] with a margin as a smooth [pixels, pixels], 0 is paper and 1 is ink."""
    smooth = Image.fromarray(np.pad(scan, 1)).resize((pixels, pixels), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(smooth, dtype=np.float32), 0.0, 1.0)


def _blur(scan: FloatArray, sigma: float) -> FloatArray:
    offsets = np.arange(8)[:, None] - np.arange(8)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum(axis=1, keepdims=True)
    return (kernel @ scan @ kernel.T).astype(np.float32)


def _grey(levels: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    return np.rint(np.clip(levels, 0.0, 1.0) * 255).astype(np.uint8)

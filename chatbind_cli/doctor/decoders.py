"""Whether every kind of media can be read: one second of each is made on the spot and decoded."""

from __future__ import annotations

import io
import struct
import wave
from collections.abc import Callable, Iterator, Mapping

from chatbind_cli.doctor.finding import OK, PROBLEM, Finding
from chatbind_cli.errors import ChatBindError

_RATE_HZ = 16_000
_FRAMES = 10
_SIZE = 64
_IMU_STEPS = 100


def look_at_decoders() -> Iterator[Finding]:
    """A finding a modality: the tensor that a second of it becomes."""
    from chatbind_cli.imagebind.preprocess import load_media  # noqa: PLC0415  loads torch

    for modality, make in _MAKERS.items():
        try:
            tensor = load_media(make(), modality).tensor
        except (ChatBindError, ImportError, OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            yield Finding("media", modality, PROBLEM, reason, "see the packages above")
            continue
        shape = " x ".join(str(size) for size in tensor.shape)
        if bool(tensor.isfinite().all()):
            yield Finding("media", modality, OK, f"decoded to {shape}")
        else:
            yield Finding("media", modality, PROBLEM, f"decoded to {shape}, not all finite")


def _ramp() -> list[int]:
    return [(x + y) * 2 % 256 for y in range(_SIZE) for x in range(_SIZE)]


def _png(mode: str, values: bytes) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.frombytes(mode, (_SIZE, _SIZE), values).save(buffer, "PNG")
    return buffer.getvalue()


def _image() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.frombytes("L", (_SIZE, _SIZE), bytes(_ramp())).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def _thermal() -> bytes:
    return _png("L", bytes(_ramp()))


def _depth() -> bytes:
    """Millimetres, 16 bit."""
    return _png("I;16", struct.pack(f"<{_SIZE**2}H", *(1000 + 10 * level for level in _ramp())))


def _audio() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_RATE_HZ)
        saw = (step * 977 % 20_000 - 10_000 for step in range(_RATE_HZ))
        file.writeframes(struct.pack(f"<{_RATE_HZ}h", *saw))
    return buffer.getvalue()


def _video() -> bytes:
    import av
    import numpy as np

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=_FRAMES)
        stream.width = stream.height = _SIZE
        stream.pix_fmt = "yuv420p"
        for number in range(_FRAMES):
            grey = np.full((_SIZE, _SIZE, 3), 20 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _imu() -> bytes:
    rows = [
        f"{step / _IMU_STEPS},0.1,0.2,9.8,0.01,0.02,{step / 1000}" for step in range(_IMU_STEPS)
    ]
    return "\n".join(["t,ax,ay,az,gx,gy,gz", *rows]).encode()


_MAKERS: Mapping[str, Callable[[], bytes]] = {
    "image": _image,
    "video": _video,
    "audio": _audio,
    "depth": _depth,
    "thermal": _thermal,
    "imu": _imu,
}

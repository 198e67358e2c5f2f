from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from chatbind_cli.errors import MediaError
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import open_source
from chatbind_cli.media.thermal import load_thermal


def load(data: bytes) -> torch.Tensor:
    return load_thermal(open_source(data), MediaOptions())


def stored(values: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    if kind == "NPY":
        np.save(buffer, values)
    else:
        Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


WARM = np.tile(np.linspace(0, 1, 224), (224, 1))


@pytest.mark.parametrize(
    "data",
    [
        stored((WARM * 255).astype(np.uint8)),
        stored((WARM * 65535).astype(np.uint16)),
        stored((WARM * 65535).astype(np.uint16), "TIFF"),
        stored((WARM * 255).astype(np.uint8), "NPY"),
        stored((WARM * 65535).astype(np.uint16), "NPY"),
        stored(WARM.astype(np.float32), "NPY"),
        stored(WARM.astype(np.float32), "TIFF"),
        stored(np.repeat((WARM * 255).astype(np.uint8)[..., None], 3, axis=2)),
    ],
)
def test_every_number_type_fills_zero_to_one(data: bytes) -> None:
    tensor = load(data)
    assert tensor.shape == (1, 224, 224) and tensor.dtype == torch.float32
    # 8-bit storage rounds down by up to 1/255
    assert (tensor[0] - torch.from_numpy(WARM)).abs().max() <= 1 / 254
    assert tensor.min() >= 0 and tensor.max() <= 1


def test_the_short_side_becomes_224_and_the_centre_stays() -> None:
    picture = np.zeros((100, 300), np.uint8)
    picture[:, 100:200] = 255
    tensor = load(stored(picture))
    torch.testing.assert_close(tensor[..., 20:-20], torch.ones(1, 224, 184))


def test_temperatures_are_not_guessed() -> None:
    with pytest.raises(MediaError, match=r"outside \[0, 1\]; scale temperatures"):
        load(stored(WARM * 300, "NPY"))
    with pytest.raises(MediaError, match=r"outside \[0, 1\]"):
        load(stored(np.full((4, 4), np.nan), "NPY"))


def test_signed_numbers_below_zero_are_cold() -> None:
    assert load(stored(np.full((4, 4), -5, np.int16), "NPY")).max() == 0


@pytest.mark.parametrize("data", [b"no picture", stored(np.ones((2, 3, 4)), "NPY")])
def test_what_is_no_thermal_picture_is_refused(data: bytes) -> None:
    with pytest.raises(MediaError):
        load(data)

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from chatbind_cli.encoders.imagebind.vision import load_image
from chatbind_cli.encoders.pixels import CLIP_MEAN, CLIP_STD
from chatbind_cli.errors import MediaError
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import open_source
from tests.recordings import image_file

OPTIONS = MediaOptions()


def load(data: bytes | Path, options: MediaOptions = OPTIONS) -> torch.Tensor:
    return load_image(open_source(data), options)


def scene(width: int = 120, height: int = 90, mode: str = "RGB") -> Image.Image:
    """A picture whose corners differ: red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    rgb = np.stack([x, y, np.full_like(x, 128)], axis=-1).astype(np.uint8)
    return Image.fromarray(rgb).convert(mode)


def colours(tensor: torch.Tensor) -> torch.Tensor:
    """Back to 0 ... 255."""
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    return (tensor * std + mean) * 255


def test_real_photos_equal_the_reference_to_the_last_bit(golden: Path, shared_data: Path) -> None:
    tensors = [load(shared_data / f"media/{n}_image.jpg") for n in ("dog", "car", "bird")]
    batch = torch.stack(tensors).numpy()
    summary = json.loads((golden / "preprocess/summary_pin.json").read_text())
    expected = summary["images_dog_car_bird"]
    sampled = batch.reshape(-1)[expected["flat_index"]]
    # bit-identical on the reference's Pillow; another JPEG decoder may differ by one level of 255
    assert np.abs(sampled - np.array(expected["value"], np.float32)).max() <= 1 / 255 / 0.26
    stored = np.load(golden / "preprocess/images_assets.npz")["images_dog_car_bird"]
    assert np.abs(batch - stored.astype(np.float32)).max() <= 1e-3 + 1 / 255 / 0.26


def test_grey_and_transparent_pictures_equal_the_reference(golden: Path) -> None:
    folder = golden / "preprocess/media"
    ours = torch.stack([load(folder / "gray_300x50.png"), load(folder / "rgba_101x231.png")])
    stored = np.load(golden / "preprocess/images_synth.npz")["images_gray_rgba"]
    # storage in float16 costs up to 1e-3 (golden README)
    assert np.abs(ours.numpy() - stored.astype(np.float32)).max() <= 1e-3


@pytest.mark.parametrize("size", [(120, 90), (90, 120), (224, 224), (225, 224), (500, 333), (1, 1)])
def test_any_size_equals_torchvisions_transform(size: tuple[int, int]) -> None:
    oracle = transforms.Compose(
        [
            transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    picture = scene(*size)
    torch.testing.assert_close(load(image_file(picture)), oracle(picture), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF"])
def test_every_format_shows_the_same_scene(kind: str) -> None:
    reference = colours(load(image_file(scene())))
    found = colours(load(image_file(scene(), kind)))
    # lossy formats and GIF's 256 colours stay close on average
    assert (found - reference).abs().mean() < 6


@pytest.mark.parametrize(
    "mode", ["L", "LA", "P", "PA", "RGBA", "CMYK", "1", "I;16", "I", "F", "YCbCr", "LAB", "HSV"]
)
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    grey = scene().convert("L")
    if mode in ("I;16", "I"):
        values = np.asarray(grey).astype(np.uint16) * 257
        picture = Image.fromarray(values if mode == "I;16" else values.astype(np.int32))
    elif mode == "F":
        picture = Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    else:
        picture = grey.convert("RGB").convert(mode) if mode not in ("L", "1") else grey
        picture = picture if mode != "1" else grey.convert("1")
        if mode == "PA":
            picture = grey.convert("RGBA").quantize().convert("PA")
    kind = "TIFF" if mode in ("CMYK", "I;16", "I", "F", "YCbCr", "LAB", "PA") else "PNG"
    if mode == "HSV":
        picture, kind = picture.convert("RGB"), "PNG"
    try:
        data = image_file(picture, kind)
    except OSError:
        pytest.skip(f"Pillow writes no {mode}")
    found = colours(load(data))
    limit = 90 if mode == "1" else 30  # a dithered or converted picture keeps its mean level
    assert abs(found.mean() - colours(load(image_file(grey))).mean()) < limit


def test_a_palette_with_transparency_is_read_without_a_warning() -> None:
    picture = scene().quantize(16)
    data = image_file(picture, "PNG", transparency=bytes(range(16)))
    torch.testing.assert_close(load(data), load(image_file(picture.convert("RGB"))))


def test_a_phones_sideways_photo_is_seen_upright() -> None:
    upright = scene(90, 120)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to see it upright
    sideways = upright.transpose(Image.Transpose.ROTATE_90)
    torch.testing.assert_close(
        load(image_file(sideways, "PNG", exif=exif)), load(image_file(upright))
    )


@pytest.mark.parametrize("size", [(100_000, 2), (2, 100_000), (3_000_000, 1)])
def test_a_strip_is_cropped_before_it_is_enlarged(size: tuple[int, int]) -> None:
    tensor = load(image_file(Image.new("L", size, 255)))
    assert tensor.shape == (3, 224, 224)
    torch.testing.assert_close(colours(tensor), torch.full((3, 224, 224), 255.0))


def chunk(name: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


def png(width: int, height: int, body: bytes, extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (png(60_000, 60_000, zlib.compress(bytes(1000))), "more than 178,956,970 pixels"),
        (png(20_000, 9_000, zlib.compress(bytes(1000))), "more than 178,956,970 pixels"),
        (png(2**31 - 1, 2**31 - 1, b""), "pixels|broken"),
        (png(100, 100, zlib.compress(bytes(50))), "broken picture"),
        (png(100, 100, b"no zlib"), "broken picture"),
        (png(0, 0, b""), "picture"),
        (png(9, 9, b"", chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8)))), "broken picture"),
        (b"\x89PNG\r\n\x1a\n", "picture"),
        (b"\xff\xd8\xff\xe0", "picture"),
        (b"GIF89a" + bytes(20), "picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (b"just text", "not a picture"),
    ],
)
def test_bombs_and_broken_pictures_are_one_line(data: bytes, what: str) -> None:
    with pytest.raises(MediaError, match=what) as caught:
        load(data)
    assert "\n" not in str(caught.value)


def test_a_truncated_photo_is_refused() -> None:
    data = image_file(scene(400, 300), "JPEG")
    with pytest.raises(MediaError, match="broken picture"):
        load(data[: len(data) // 2])


def test_the_limit_of_pixels_can_be_raised() -> None:
    data = image_file(scene(20, 20))
    with pytest.raises(MediaError, match="--max-pixels"):
        load(data, MediaOptions(max_pixels=399))
    assert load(data, MediaOptions(max_pixels=400)).shape == (3, 224, 224)

"""How much memory a picture takes to decode, by its header, and how to make it take less.

The numbers are what Pillow's readers were measured to take, a little above rather than below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

from PIL import Image, ImageFile

from chatbind_cli.media.guard import ONE_BYTES
from chatbind_cli.media.source import MediaSource

MAP_WORK = 32
"""Bytes for each pixel in the calculations with a map of depth or heat, its float32 included."""

STEPS = (1, 2, 4, 8)
"""How many times smaller a picture may be made in both directions to fit the budget."""

_BASE = 8 * 2**20

_STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
"""Bytes a pixel in Pillow's memory; 4 in all other modes."""

_TO_RGB = {"RGB": 0, "I": 24, "F": 24, "I;16": 12, "I;16B": 12, "I;16L": 12, "I;16N": 12}
"""Bytes a pixel that the way to RGB adds; 8 in all other modes."""

_MOST_SCANS = 200
"""A progressive JPEG has about ten; each costs as much time as the whole picture."""


class Plan(NamedTuple):
    """What a decode costs in bytes, if the picture is made `step` times smaller on the way."""

    cost: int
    step: int


def webp_plan(source: MediaSource) -> Plan | None:
    """The plan for a WebP file by its first bytes; None for other formats."""
    head = source.head(30)
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    kind = head[12:16]
    if kind == b"VP8X":
        size = [1 + int.from_bytes(head[at : at + 3], "little") for at in (24, 27)]
    elif kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        size = [1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)]
    else:
        size = [int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (26, 28)]
    # the reader keeps 8 bytes a pixel beside Pillow's 4
    return _plan(size, 4 + 8, 4, 2 * source.size, 8, shrinks=False)


def picture_plan(
    picture: ImageFile.ImageFile, source: MediaSource, stream: BinaryIO, work: int
) -> Plan:
    """The plan for an opened picture; JPEG and JPEG 2000 are told to decode it smaller.

    Args:
        picture: not decoded yet.
        source: its file.
        stream: the file, where opening has left it.
        work: bytes that the caller needs for each pixel.

    Raises:
        ValueError: it has more scans than a picture has.
    """
    stored = _STORED.get(picture.mode, 4)
    shrinks = picture.format in ("JPEG", "MPO", "JPEG2000")
    # PNG says which way up it is at the end of the file only, and to ask would decode it
    turned = picture.format == "PNG" or picture.getexif().get(0x0112, 1) != 1
    works, fixed = _reader_cost(picture, source, stream)
    if turned and picture.format == "TIFF":  # turns itself while it is read
        works += stored
    each = max(work, _TO_RGB.get(picture.mode, 8)) + 4 * turned
    plan = _plan(picture.size, stored, works, fixed, each, shrinks=shrinks)
    if not shrinks or plan.step == 1:
        return plan
    if picture.format == "JPEG2000":
        picture.reduce = plan.step.bit_length() - 1  # type: ignore[method-assign, assignment]
    else:
        small = (picture.width // plan.step, picture.height // plan.step)
        picture.draft(picture.mode, small)
    return Plan(plan.cost, 1)


def _plan(
    size: Sequence[int], stored: int, works: int, fixed: int, work: int, *, shrinks: bool
) -> Plan:
    """The smallest step that fits the budget, or the largest step and a cost that does not.

    Args:
        size: width and height.
        stored: bytes a pixel of the decoded picture.
        works: bytes a pixel that the reader takes beside that while it works.
        fixed: bytes that the reader takes whatever the step.
        work: bytes a pixel that come after decoding.
        shrinks: whether the reader itself makes the picture smaller.
    """
    width, height = size
    # rows have pointers, and readers hold a few of the longest possible ones
    lines = 24 * width + 16 * height
    for step in STEPS:
        left = -(-width // step) * -(-height // step)
        pixels = left if shrinks else width * height
        small = 4 * left if step > 1 and not shrinks else 0
        cost = pixels * stored + max(pixels * works, small + left * work)
        cost += _BASE + fixed + lines
        if cost <= ONE_BYTES:
            break
    return Plan(cost, step)


def _reader_cost(
    picture: ImageFile.ImageFile, source: MediaSource, stream: BinaryIO
) -> tuple[int, int]:
    """Bytes a pixel that a reader takes while it works, and bytes that it takes in any case."""
    raw = all(tile.codec_name == "raw" for tile in picture.tile)
    match picture.format:
        case "JPEG" | "MPO":
            return 0, _coefficients(picture, stream)
        case "GIF":
            return 4, 0
        case "AVIF":
            return 12, 2 * source.size
        case "JPEG2000":
            return 6 * len(picture.getbands()), 0
        case "TIFF" if not raw:
            return 0, _strip(picture) + source.size
        case "BMP" | "DIB" if not raw:
            return 4, 0
        case "PPM" if not raw:
            return 12, 0
        case _:
            return 0, 0


def _coefficients(picture: Image.Image, stream: BinaryIO) -> int:
    """Bytes that libjpeg takes for the whole picture's coefficients, whatever size is asked for.

    It needs them where the picture comes in several scans; else a few rows are enough.

    Raises:
        ValueError: there are more scans than a picture has.
    """
    scans, last, ended = 1, b"", b""
    while not ended and (part := stream.read(1 << 20)):  # Pillow stops behind the first scan's head
        inside, ended, _ = (last + part).partition(b"\xff\xd9")
        scans += inside.count(b"\xff\xda")
        last = part[-1:]
    if scans > _MOST_SCANS:
        raise ValueError(f"more than {_MOST_SCANS} scans")
    if scans == 1 and "progressive" not in picture.info:
        return 0
    layers = picture.layer  # type: ignore[attr-defined]
    widest, highest = max(layer[1] for layer in layers), max(layer[2] for layer in layers)
    blocks = sum(layer[1] * layer[2] for layer in layers) / (widest * highest)
    return round(2 * blocks * (picture.width + 64) * (picture.height + 64))


def _strip(picture: Image.Image) -> int:
    """Bytes of the largest piece that a compressed TIFF is unpacked in."""
    tags = picture.tag_v2  # type: ignore[attr-defined]
    bits = tags.get(258, (1,))
    depth = max(bits) if isinstance(bits, tuple) else int(bits)
    width = int(tags.get(322, picture.width))
    rows = min(int(tags.get(323, tags.get(278, picture.height))), max(picture.height, 1 << 16))
    return width * rows * max(4, int(tags.get(277, 1)) * depth // 8)

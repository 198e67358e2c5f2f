"""What a file is, told by its content: names lie, and streams have none.

Looks at no more than the first bytes and, for sound and video, at the container's list of streams.
Reading the content is left to the loaders.
"""

from __future__ import annotations

import codecs

from chatbind_cli.errors import MediaError
from chatbind_cli.media.guard import IMPORTING
from chatbind_cli.media.source import MediaSource

_HEAD_BYTES = 4096
_EXPLICIT = "say it with --image, --video, --audio, --depth, --thermal or --imu"

_GIF_FRAME = b"\x21\xf9\x04"
"""The block that precedes every frame of an animated GIF."""

_STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1")
"""Of MP4's container, where it holds a photo."""

_WRONG_KINDS = (
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x7fELF", "a program"),
    (b"\x89HDF", "an HDF5 file"),
    (b"#EXTM3U", "a playlist"),
    (b"<!DOCTYPE", "a web page"),
    (b"<!doctype", "a web page"),
    (b"<html", "a web page"),
    (b"{", "JSON"),
    (b"[", "JSON"),
)


def sniff(source: MediaSource) -> str:
    """The modality of a file, by content.

    A picture of one 16-bit channel (PNG, TIFF) or of floating-point numbers, and a two-dimensional
    NPY array, are depth maps; an NPY array with a side of 6, Parquet and CSV are motion
    recordings; a GIF of several frames is a video; a container with moving pictures is a video, one
    with sound alone is audio. A thermal picture looks like any grey picture: it has to be named.

    Returns:
        one of `MODALITIES`, never `thermal`.

    Raises:
        MediaError: it is none of these, or broken beyond recognition.
    """
    head = source.head(_HEAD_BYTES)
    known = (
        _raster(head, source) or _array(head, source) or _container(head, source) or _table(head)
    )
    if known is not None:
        return known
    for magic, what in _WRONG_KINDS:
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(magic):
            raise MediaError(f"is {what}, not a media file", where=source.name, hint=_EXPLICIT)
    raise MediaError("is of no kind that can be told", where=source.name, hint=_EXPLICIT)


def _raster(head: bytes, source: MediaSource) -> str | None:
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        # IHDR: length, name, width, height, then bit depth and colour type (0 = grey)
        return "depth" if head[24:26] == b"\x10\x00" else "image"
    if head.startswith((b"II*\0", b"MM\0*")):
        with IMPORTING:
            from chatbind_cli.media.pictures import is_measurement  # noqa: PLC0415

        return "depth" if is_measurement(source) else "image"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "video" if source.head(1 << 20).count(_GIF_FRAME) > 1 else "image"
    known = (
        head.startswith((b"\xff\xd8\xff", b"BM", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"))
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS)
        or (head[:1] == b"P" and head[1:2] in b"123456" and head[2:3] in b" \t\r\n")
    )
    return "image" if known else None


def _array(head: bytes, source: MediaSource) -> str | None:
    if head.startswith(b"PAR1"):
        return "imu"
    if not head.startswith(b"\x93NUMPY"):
        return None
    with IMPORTING:
        from chatbind_cli.media.maps import read_npy_header  # noqa: PLC0415

    header = read_npy_header(source)
    if len(header.sides) == 2:
        return "imu" if 6 in header.sides else "depth"
    raise MediaError(
        f"is an array of shape {list(header.shape)}: neither a depth map [height, width] nor "
        "motion [6, steps]",
        where=source.name,
    )


def _container(head: bytes, source: MediaSource) -> str | None:
    if not _may_be_container(head):
        return None
    with IMPORTING:
        from chatbind_cli.media.container import audio_streams, open_container, video_streams  # noqa: PLC0415

    with open_container(source) as container:
        if video_streams(container):
            return "video"
        if audio_streams(container):
            return "audio"
    raise MediaError("holds neither sound nor video", where=source.name)


def _may_be_container(head: bytes) -> bool:
    """Whether to ask FFmpeg: it finds sound in plain text too, given enough of it."""
    if head.startswith(
        (
            b"RIFF", b"RF64", b"RIFX", b"fLaC", b"OggS", b"\x1a\x45\xdf\xa3", b"ID3", b"FORM",
            b".snd", b"#!AMR", b"FLV\x01", b"\x30\x26\xb2\x75", b"caff", b"MAC ", b"wvpk", b"TTA",
            b"riff\x2e\x91", b"\0\0\x01\xba", b"\0\0\x01\xb3", b"\x0b\x77", b"Creative Voice",
            b"nut/multimedia", b"\x06\x0e\x2b\x34", b"\x7f\xfe\x80\x01",
        )
    ):  # fmt: skip
        return True
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return True
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:  # MPEG audio frame sync
        return True
    # MPEG transport stream: a sync byte every 188 bytes (192 with time codes in front)
    return (head[0:1] == head[188:189] == b"G") or head[4:5] == head[196:197] == b"G"


def _table(head: bytes) -> str | None:
    """Text with several numbers on a line is taken for a motion recording."""
    try:
        text = beginning_of_text(head)
    except UnicodeDecodeError:
        return None
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    for line in lines[:3]:
        cells = [cell for cell in line.replace(";", ",").replace("\t", ",").split(",") if cell]
        if len(cells) >= 6 and all(is_number(cell) for cell in cells):
            return "imu"
    return None


def beginning_of_text(head: bytes) -> str:
    """The first bytes of a file as text, without a character that they cut.

    Raises:
        UnicodeDecodeError: they are no text.
    """
    return codecs.getincrementaldecoder("utf-8-sig")().decode(head)


def is_number(cell: str) -> bool:
    """Whether a cell of a table is a number, in quotes or not."""
    try:
        float(cell.strip().strip('"'))
    except ValueError:
        return False
    return True

"""One door to the encoder's input: a file, URL, byte string or stream goes in, a tensor comes out.

How a modality's tensor is made stands in `vision`, `audio`, `planes` and `imu`, which are imported
when their modality is first asked for, so a picture does not wait for the audio libraries.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from chatbind_cli.errors import MediaError, UsageError, contained
from chatbind_cli.media.guard import IMPORTING
from chatbind_cli.media.modality import MODALITIES
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.sniff import sniff
from chatbind_cli.media.source import MediaSource, open_source, shown


@dataclass(frozen=True, eq=False)
class Decoded:
    """One file as the encoder wants it.

    `tensor` is float32: image [3, 224, 224]; video [clips * 3 crops, 3 colours, 2 frames, 224,
    224]; audio [clips, 1, 128 mel bins, 204 steps]; depth and thermal [1, 224, 224]; imu [6, 2000].
    """

    source: MediaSource
    modality: str
    tensor: torch.Tensor


def load_media(
    source: MediaSource | str | Path | bytes,
    modality: str | None = None,
    options: MediaOptions = MediaOptions(),  # noqa: B008 (frozen, so safe to share)
) -> Decoded:
    """Reads one file, URL, data URI or byte string.

    Args:
        source: an opened source, or whatever `open_source` takes.
        modality: what it is; None looks at the content.
        options: how to read it.

    Raises:
        ChatBindError: it cannot be found, told or read, whatever a library raised on the way.
        UsageError: `modality` is not the name of a modality.
    """
    if modality is not None and modality not in MODALITIES:
        raise UsageError(f"{modality!r} is not a modality", hint=f"one of {', '.join(MODALITIES)}")
    where = source.name if isinstance(source, MediaSource) else "<bytes>"
    try:
        if isinstance(source, (str, Path)):
            where = shown(str(source))
        opened = source if isinstance(source, MediaSource) else open_source(source)
        found = modality if modality is not None else sniff(opened)
        tensor = _load(opened, found, options)
    except Exception as error:
        _let_go(error)
        failure = contained(error, where=where)
        if failure is error:
            raise
        raise failure from error
    if not tensor.isfinite().all():
        # no encoder is to see it: one such value makes a whole embedding NaN
        raise MediaError(f"gives numbers that no {found} has (NaN or infinity)", where=where)
    return Decoded(source=opened, modality=found, tensor=tensor)


def _let_go(error: BaseException | None) -> None:
    """Empties the frames of an error: it may be kept for long, and they hold what was decoded."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _load(source: MediaSource, modality: str, options: MediaOptions) -> torch.Tensor:
    with IMPORTING:
        match modality:
            case "image":
                from chatbind_cli.encoders.imagebind.vision import load_image as load  # noqa: PLC0415
            case "video":
                from chatbind_cli.encoders.imagebind.vision import load_video as load  # noqa: PLC0415
            case "audio":
                from chatbind_cli.encoders.imagebind.audio import load_audio as load  # noqa: PLC0415
            case "depth":
                from chatbind_cli.encoders.imagebind.planes import load_depth as load  # noqa: PLC0415
            case "thermal":
                from chatbind_cli.encoders.imagebind.planes import load_thermal as load  # noqa: PLC0415
            case _:
                from chatbind_cli.encoders.imagebind.imu import load_imu as load  # noqa: PLC0415
    return load(source, options)

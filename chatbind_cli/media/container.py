"""Opening sound and video files with the FFmpeg that PyAV carries, and asking how long they are.

Files may come from strangers, so only container formats that hold their own data are accepted:
playlists and the like could make FFmpeg open other files or addresses. What the streams hold is the
business of `audio` and `video`.
"""

from __future__ import annotations

import io
import math
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np
import numpy.typing as npt
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.stream import VideoStream

from chatbind_cli.errors import MediaError
from chatbind_cli.media.guard import Timed, check_time, decoding, reading
from chatbind_cli.media.source import MediaSource

_FORMATS = (
    "aac", "ac3", "aiff", "amr", "amrnb", "amrwb", "ape", "asf", "au", "avi", "caf", "dts", "eac3",
    "flac", "flv", "gif", "matroska", "mov", "mp3", "mpeg", "mpegts", "mxf", "nut", "ogg", "tta",
    "voc", "w64", "wav", "wv",
)  # fmt: skip

_STATES_ITS_LENGTH = frozenset({"flac", "matroska", "mov", "mp4", "wav", "webm", "w64"})
"""Containers whose header says how long the content is; others let FFmpeg estimate."""

_MOST_STREAMS = 64

_UNKNOWN_RIFF_SIZE = 0x7FFF_F000

_MOST_SAMPLES = 3_000_000
"""Of all tracks together: ten hours of video at 60 frames a second and sound in packets."""

_LARGEST_MOOV = 64 * 2**20
_MOST_BOXES = 200_000
_FOLDERS = frozenset({b"trak", b"mdia", b"minf", b"stbl", b"traf"})

_PROBE_BYTES = 256 * 2**20
_PROBE_PIXELS = 9_500_000
"""FFmpeg decodes some frames to find out what a stream is, up to twenty of H.264 and HEVC; of
larger ones the header has to be enough."""

_FEW_ARE_PROBED = frozenset({"h264", "hevc"})


@contextmanager
def open_container(source: MediaSource) -> Iterator[InputContainer]:
    """The opened container; it and the file are closed at the end of the block.

    Raises:
        MediaError: FFmpeg cannot read it, here or later inside the block; or the file is shorter
            than it says.
    """
    _refuse_cut_riff(source)
    _refuse_endless_tables(source)
    with source.open() as stream, reading(source.name, "cannot be decoded"):
        with decoding(_PROBE_BYTES, source.name):
            container = _opened(stream)
        with container:
            yield container


def _opened(stream: BinaryIO) -> InputContainer:
    container = _open(stream, _PROBE_PIXELS)
    unknown = [video for video in video_streams(container) if not video.codec_context.width]
    if unknown and not any(video.name in _FEW_ARE_PROBED for video in video_streams(container)):
        container.close()
        stream.seek(0)
        container = _open(stream, 2**28)
    return container


def _open(stream: BinaryIO, max_pixels: int, streams: int = _MOST_STREAMS) -> InputContainer:
    try:
        return av.open(  # type: ignore[call-overload]  # its stub takes the options for strings
            # a stream without a name: the format is told by content and never by extension
            Timed(stream),
            mode="r",
            options={"format_whitelist": ",".join(_FORMATS)},
            stream_options=[{"max_pixels": str(max_pixels), "threads": "1"}] * streams,
            metadata_errors="replace",
        )
    except ValueError as error:
        if isinstance(error, av.FFmpegError) or not streams:
            raise
        stream.seek(0)  # PyAV takes no such options where streams are found on the way (MPEG, FLV)
        return _open(stream, max_pixels, 0)


def video_streams(container: InputContainer) -> list[VideoStream]:
    """The streams of moving pictures that can be decoded; cover pictures are none."""
    return [
        stream
        for stream in container.streams.video
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic
    ]


def audio_streams(container: InputContainer) -> list[AudioStream]:
    """The streams of sound that can be decoded."""
    return [stream for stream in container.streams.audio if stream.codec_context is not None]


def decoded(
    container: InputContainer, stream: Stream, sent: Callable[[], None] | None = None
) -> Iterator[Any]:
    """Frames of the stream's kind from the current position on.

    A broken packet is passed over, as every player does.
    After a jump the first packets often refer to ones before it, so they alone are no sign of a
    broken file. `sent` is called before each packet goes into the decoder.
    """
    for packet in _packets(container, stream):
        if sent is not None:
            sent()
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            continue
        yield from frames


def declared_seconds(container: InputContainer, stream: Stream) -> Fraction | None:
    """How long the stream is, by what its header says or FFmpeg estimates; None: not known."""
    if stream.duration is not None and stream.duration > 0 and stream.time_base is not None:
        return Fraction(stream.duration * stream.time_base)
    if container.duration is not None and container.duration > 0:
        return Fraction(container.duration, av.time_base)
    return None


def measured_seconds(container: InputContainer, stream: Stream) -> Fraction | None:
    """How long the stream is, by reading through its packets without decoding them."""
    rewind(container)
    first: int | None = None
    end = 0
    for packet in _packets(container, stream):
        if packet.pts is None:
            continue
        first = packet.pts if first is None else min(first, packet.pts)
        end = max(end, packet.pts + (packet.duration or 0))
    rewind(container)
    if first is None or stream.time_base is None or end <= first:
        return None
    return Fraction((end - first) * stream.time_base)


class Times(NamedTuple):
    """When the frames of a film are shown.

    Attributes:
        ticks: [frames], from the stream's start, in order.
        unit: of a tick, in seconds.
        end: of the last frame, in ticks.
    """

    ticks: npt.NDArray[np.int64]
    unit: Fraction
    end: int


def frame_times(container: InputContainer, stream: VideoStream) -> Times:
    """When each frame is shown, by reading through its packets without decoding them."""
    rewind(container)
    ticks, count, end = array("q"), 0, 0
    for packet in _packets(container, stream):
        if packet.size and not packet.is_discard:
            count += 1
            if packet.pts is not None:
                ticks.append(packet.pts)
                end = max(end, packet.pts + (packet.duration or 0))
    rewind(container)
    if not ticks or stream.time_base is None:
        return Times(np.arange(count), 1 / (stream.average_rate or Fraction(25)), count)
    first = stream.start_time or 0
    return Times(np.sort(np.asarray(ticks)) - first, stream.time_base, end - first)


def _packets(container: InputContainer, stream: Stream) -> Iterator[Packet[Stream]]:
    try:
        for packet in container.demux(stream):
            check_time()
            yield packet
    except IndexError as error:
        # how PyAV fails where a broadcast stream announces a further stream midway
        raise av.error.InvalidDataError(0, "a stream begins midway") from error


def rewind(container: InputContainer) -> None:
    """Back to the first packet."""
    start = min(container.start_time or 0, 0)
    try:
        # a second early: codecs with a delay have packets before the time stamp 0
        container.seek(start - av.time_base)
    except av.FFmpegError:
        container.seek(start)


def seek_before(container: InputContainer, stream: Stream, time: Fraction) -> None:
    """To the last point at or before `time` from which decoding can begin; else to the start.

    What has no index (MPEG's own containers) jumps between two such points, and that of FLV counts
    in order of decoding and has one behind the last frame: what comes there is looked at first.
    """
    back = Fraction(0)
    while stream.time_base is not None and time - back >= start_seconds(stream):
        place = math.floor((time - back) / stream.time_base)
        try:
            container.seek(place, stream=stream, backward=True)
            if _begins_before(container, stream, math.floor(time / stream.time_base)):
                container.seek(place, stream=stream, backward=True)
                return
        except av.FFmpegError:
            break
        back = 2 * back or Fraction(1)
    rewind(container)


def _begins_before(container: InputContainer, stream: Stream, place: int) -> bool:
    """Whether decoding can begin between here and a time stamp."""
    for packet in _packets(container, stream):
        if packet.size and packet.is_keyframe:
            return packet.pts is None or packet.pts <= place
        if packet.dts is not None and packet.dts > place:
            break
    return False


def start_seconds(stream: Stream) -> Fraction:
    """The time stamp at which the stream's clock begins; often 0."""
    if stream.start_time is None or stream.time_base is None:
        return Fraction(0)
    return Fraction(stream.start_time * stream.time_base)


def refuse_cut_short(
    container: InputContainer, source: MediaSource, declared: Fraction | None, found: Fraction
) -> None:
    """Refuses a file that ends well before the length in its header: a broken download.

    Raises:
        MediaError: less than nine tenths of the content is there.
    """
    if declared is None or not _STATES_ITS_LENGTH & set(container.format.name.split(",")):
        return
    if found < declared * Fraction(9, 10) - Fraction(1, 5):
        raise MediaError(
            f"is cut short: {float(found):.4g} of {float(declared):.4g} seconds are there",
            where=source.name,
        )


def _refuse_cut_riff(source: MediaSource) -> None:
    """FFmpeg takes the length of a cut WAV or AIFF from the file, so its header is asked here."""
    head = source.head(8)
    if head[:4] not in (b"RIFF", b"FORM"):
        return
    size = int.from_bytes(head[4:8], "little" if head[:4] == b"RIFF" else "big") + 8
    # programs that write to a pipe cannot know the size, and put 0 or the largest one
    if size < _UNKNOWN_RIFF_SIZE and source.size < size * 0.9:
        raise MediaError(
            f"is cut short: {source.size:,} of {size:,} bytes are there", where=source.name
        )


def _refuse_endless_tables(source: MediaSource) -> None:
    """Refuses an MP4 or QuickTime file that states more samples than there is room for.

    A few bytes can state twenty million of equal size, and FFmpeg takes 70 bytes of memory for each
    when the file is opened.
    """
    head = source.head(8)
    if head[4:8] not in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return
    samples = 0
    with source.open() as stream:
        for kind, start, size in _boxes(stream, 0, source.size):
            if kind not in (b"moov", b"moof"):
                continue
            if size > _LARGEST_MOOV:
                raise MediaError("has larger tables than any film", where=source.name)
            stream.seek(start)
            content = stream.read(size)
            if b"cmov" in content[:64]:
                raise MediaError("has compressed tables, which are not read", where=source.name)
            samples += _samples(content)
            if samples > _MOST_SAMPLES:
                raise MediaError(
                    f"states more than {_MOST_SAMPLES:,} samples", where=source.name, hint="cut it"
                )


def _boxes(stream: BinaryIO, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and size of the content of each box between two places."""
    for _ in range(_MOST_BOXES):
        stream.seek(at)
        head = stream.read(16)
        size, first = int.from_bytes(head[:4], "big"), 8
        if size == 1:
            size, first = int.from_bytes(head[8:16], "big"), 16
        elif size == 0:
            size = end - at
        if len(head) < 8 or size < first:
            return
        yield head[4:8], at + first, min(size, end - at) - first
        at += size
        if at >= end:
            return


def _samples(content: bytes) -> int:
    """How many samples FFmpeg would list for the boxes of a `moov` or `moof`."""
    stream = io.BytesIO(content)
    listed, even = 0, False
    for kind, start, size in _boxes(stream, 0, len(content)):
        part = content[start : start + size]
        if kind in _FOLDERS:
            listed += _samples(part)
        elif kind in (b"stsz", b"stz2"):
            listed += int.from_bytes(part[8:12], "big")
        elif kind == b"trun":
            listed += int.from_bytes(part[4:8], "big")
        elif kind == b"stts":
            # sound of single samples, each a tick long, is listed by chunks
            even = part[4:8] == b"\0\0\0\1" and part[12:16] == b"\0\0\0\1"
    return 0 if even else listed

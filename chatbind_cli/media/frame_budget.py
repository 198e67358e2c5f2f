"""How much memory the frames of a film take: in its decoder, and while they become crops.

Headers state the size of a frame, but not how many of them a decoder keeps; so room for a usual
number is taken, and they are counted as they come out.
"""

from __future__ import annotations

from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from chatbind_cli.errors import MediaError
from chatbind_cli.media.guard import ONE_BYTES

WHOLE_PIXELS = 9_000_000
"""Larger frames (4K has 8.3 million pixels) are scaled down before they become numbers."""

SMALL_PIXELS = WHOLE_PIXELS // 4
"""What they are scaled down to."""

_CONVERTED = 18
"""Bytes a pixel on the way from a frame to crops."""

_TABLES = 0.6
"""Bytes a pixel that a decoder keeps beside a frame, for the motion of each block."""

_BASE = 32 * 2**20

_SMALLEST = 512
"""Width and height for which there is always room: decoders ask for margins around small frames."""

_ALONE = frozenset(
    ("ffv1", "gif", "png", "apng", "qtrle", "ffvhuff", "huffyuv", "rawvideo", "mjpeg", "utvideo")
)
"""Codecs that keep one frame at most. Others refer to several: sixteen at most, and a few more."""

_FEW, _MANY = (3, 6), (5, 22)
"""Frames that exist at once, ours included, in such codecs and in others: at least and at most."""


class FrameBudget:
    """What decoding a stream of video costs, and a count of the frames that exist.

    Attributes:
        cost: bytes to reserve.
        pixels: largest frame for which the reserved memory is enough.
    """

    def __init__(self, stream: VideoStream, where: str) -> None:
        context = stream.codec_context
        alone = context.codec.intra_only or context.name in _ALONE
        self._tables = 0.0 if alone else _TABLES
        least, most = _FEW if alone else _MANY
        bits = context.format.padded_bits_per_pixel if context.format is not None else 32
        pixels = context.width * context.height
        one = self._bytes(max(context.width, _SMALLEST), max(context.height, _SMALLEST), bits)
        around = _BASE + _CONVERTED * (pixels if pixels <= WHOLE_PIXELS else SMALL_PIXELS)
        full = around + most * one
        self.cost = full if full <= ONE_BYTES else max(ONE_BYTES, around + least * one)
        self._room = self.cost - around
        self.pixels = max(pixels, round(self._room / (least * (max(bits, 8) / 8 + self._tables))))
        self._where = where
        self._seen: dict[int, int] = {}
        self._waiting = 0
        self._one = self._bytes(context.width, context.height, bits)

    def _bytes(self, width: int, height: int, bits: int) -> int:
        # decoders round up and draw beyond the edges
        return round((width + 64) * (height + 64) * (bits / 8 + self._tables))

    def sent(self) -> None:
        """A packet goes into the decoder: there may be one frame more.

        Raises:
            MediaError: all of them would take more than was reserved.
        """
        self._waiting += 1
        taken = sum(self._seen.values()) + self._waiting * self._one
        if taken > self._room:
            raise MediaError(
                f"needs more than {self._room / 2**20:,.0f} MiB for the frames that refer to each "
                "other",
                where=self._where,
                hint="make it smaller, or save it in another format",
            )

    def received(self, frame: VideoFrame) -> None:
        """A frame came out: whether it lies where an earlier one did tells how many there are."""
        size = self._bytes(frame.width, frame.height, frame.format.padded_bits_per_pixel)
        if size != self._one:
            self._seen.clear()
            self._one = size
        self._waiting = max(self._waiting - 1, 0)
        self._seen[frame.planes[0].buffer_ptr] = size

    def flushed(self) -> None:
        """The decoder has jumped, and let all its frames go."""
        self._waiting = 0
        self._seen.clear()

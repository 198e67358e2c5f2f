"""Motion recordings from files: six channels in SI units, and the time of each reading.

ImageBind published no loader for motion; the rules for reading files are ours and stand in
`open_motion`, those for windows of equal steps in `read_window`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from chatbind_cli.errors import MediaError
from chatbind_cli.media.guard import decoding
from chatbind_cli.media.maps import is_npy, read_npy, read_npy_header
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import MediaSource
from chatbind_cli.media.tables import Columns, csv_rows, parquet_rows, read_csv, read_parquet

Numbers = npt.NDArray[np.float64]

_CHANNELS = 6
_GRAVITY = 9.80665
_MOST = 1e9
"""No sensor measures more, in any unit; broken files do, and would overflow."""

_BASE_BYTES = 128 * 2**20
_STEP_BYTES = 200
"""Memory that a step takes on its way to a tensor; an hour at 500 Hz fits the budget."""

_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_UNIT_ENDINGS = {
    "ns": "ns", "nanoseconds": "ns", "us": "us", "microseconds": "us", "ms": "ms", "msec": "ms",
    "milliseconds": "ms", "s": "s", "sec": "s", "secs": "s", "seconds": "s",
}  # fmt: skip
_TIME_NAMES = frozenset({"t", "time", "timestamp", "timestamps", "ts", "seconds", "elapsed"})
_ACCEL = r"(?:linear)?(?:user)?(?:acceleration|accelerometer|accel|acc|acce|a)"
_GYRO = r"(?:angular(?:velocity|rate)|rotation(?:rate)?|gyroscope|gyro|gyr|omega|w|g)"


class Motion(NamedTuple):
    """A recording without holes.

    Attributes:
        channels: [6, readings]: accelerometer x, y, z in m/s^2, then gyroscope x, y, z in rad/s.
        seconds: [readings], from 0 on, never backwards; None where nothing says the rate.
    """

    channels: Numbers
    seconds: Numbers | None


class _Table(NamedTuple):
    """What a file holds: the channels, and the name and values of a column of time."""

    channels: Numbers
    time: tuple[str, Numbers] | None = None


@contextmanager
def open_motion(source: MediaSource, options: MediaOptions) -> Iterator[Motion]:
    """Reads a recording; inside the block there is room for calculations with it.

    CSV (with a header such as `timestamp,acc_x,acc_y,acc_z,gyro_x,gyro_y,gyro_z`; common spellings
    are known; without a header: six columns in that order, or seven with the time first), Parquet
    with such columns, or NPY of shape [6, steps] or [steps, 6]. `options.imu_accel_unit` `g` and
    `options.imu_gyro_unit` `deg/s` are converted.

    Time: `options.imu_rate_hz`, or a time column (its unit from its name, else the one that makes 5
    to 5000 samples a second). Missing cells are filled in from their neighbours.

    Raises:
        MediaError: columns are missing, time runs backwards, or the file is broken or too large.
    """
    most = options.max_array_bytes
    if is_npy(source):
        numbers = math.prod(read_npy_header(source).shape)
        with decoding(min(source.size, most) + numbers // 6 * _STEP_BYTES, source.name):
            yield _motion(_from_array(source, options), source, options)
    elif source.head(4) == b"PAR1":
        rows = parquet_rows(source, most)
        with decoding(_BASE_BYTES + rows * _STEP_BYTES, source.name):
            yield _motion(_by_name(read_parquet(source, rows, _is_wanted), source), source, options)
    else:
        # text that is no number stays text, and takes what it takes in the file
        cost = max(csv_rows(source, most) * _STEP_BYTES, 3 * source.size)
        with decoding(_BASE_BYTES + cost, source.name):
            columns, named = read_csv(source, _is_wanted)
            table = _by_name(columns, source) if named else _by_order(columns, source)
            yield _motion(table, source, options)


def _motion(table: _Table, source: MediaSource, options: MediaOptions) -> Motion:
    scale = np.ones((_CHANNELS, 1))
    scale[:3] = _GRAVITY if options.imu_accel_unit == "g" else 1.0
    scale[3:] = np.pi / 180 if options.imu_gyro_unit == "deg/s" else 1.0
    channels = table.channels
    channels *= scale
    count = channels.shape[1]
    if options.imu_rate_hz is not None:
        seconds: Numbers | None = np.arange(count, dtype=np.float64) / options.imu_rate_hz
    else:
        seconds = None if table.time is None else _clock(*table.time, source)
    _fill(channels, np.arange(count) if seconds is None else seconds, source)
    return Motion(channels, seconds)


def _from_array(source: MediaSource, options: MediaOptions) -> _Table:
    array = read_npy(source, options.max_array_bytes)
    if array.ndim == 2 and array.shape[0] == _CHANNELS:
        return _Table(array.astype(np.float64))
    if array.ndim == 2 and array.shape[1] == _CHANNELS:
        return _Table(array.T.astype(np.float64))
    raise MediaError(
        f"is an array of shape {list(array.shape)}, not [6, steps] or [steps, 6]",
        where=source.name,
    )


def _by_name(columns: Columns, source: MediaSource) -> _Table:
    """The six channels and the time column by their names."""
    found: dict[str, str] = {}
    for name in columns:
        channel = _channel(name)
        if channel in found and channel != "time":
            raise MediaError(
                f"columns {found[channel]!r} and {name!r} both look like {channel}",
                where=source.name,
            )
        if channel is not None:
            found.setdefault(channel, name)
    wanted = [f"{sensor} {axis}" for sensor in ("accelerometer", "gyroscope") for axis in "xyz"]
    missing = [channel for channel in wanted if channel not in found]
    if missing:
        raise MediaError(
            f"has no column for {', '.join(missing)}",
            where=source.name,
            hint="name them acc_x, acc_y, acc_z, gyro_x, gyro_y, gyro_z (and timestamp)",
        )
    time = found.get("time")
    channels = np.stack([columns[found[channel]] for channel in wanted])
    return _Table(channels, None if time is None else (time, columns[time]))


def _is_wanted(name: str) -> bool:
    return _channel(name) is not None


def _channel(name: str) -> str | None:
    """`accelerometer x` ... `gyroscope z`, `time`, or None for a column that is something else."""
    # units in brackets or after a slash are not part of the name
    bare = re.sub(r"[\[(].*?[\])]|/.*$|#\d+$", "", name.lower())
    bare = re.sub(r"(?:_|\b)(?:m|mps2|ms2|rad|rads|radps|deg|dps|g)(?:_s2?)?$", "", bare)
    plain = re.sub(r"[^a-z0-9]", "", bare)
    for sensor, words in (("accelerometer", _ACCEL), ("gyroscope", _GYRO)):
        match = re.fullmatch(rf"(?:imu\d?)?{words}([xyz])(?:axis)?", plain) or re.fullmatch(
            rf"(?:imu\d?)?([xyz])(?:axis)?{words}", plain
        )
        if match:
            return f"{sensor} {match[1]}"
    words_of = re.findall(r"[a-z]+", name.lower())
    return "time" if words_of and words_of[0] in _TIME_NAMES else None


def _by_order(columns: Columns, source: MediaSource) -> _Table:
    values = list(columns.values())
    if len(values) == _CHANNELS:
        return _Table(np.stack(values))
    if len(values) == _CHANNELS + 1:
        return _Table(np.stack(values[1:]), ("time", values[0]))
    raise MediaError(
        f"has {len(values)} columns and no header",
        where=source.name,
        hint="six columns (acc x y z, gyro x y z), or seven with the time first",
    )


def _clock(name: str, values: Numbers, source: MediaSource) -> Numbers:
    """The time of each sample in seconds, starting at 0."""
    if len(values) < 2 or not np.isfinite(values).all():
        raise MediaError(f"has no usable time in column {name!r}", where=source.name)
    steps = np.diff(values)
    if (steps < 0).any():
        row = int(np.argmax(steps < 0)) + 2
        raise MediaError(f"time runs backwards at row {row}", where=source.name)
    typical = float(np.median(steps[steps > 0])) if (steps > 0).any() else 0.0
    unit = _time_unit(name, typical)
    if unit is None:
        raise MediaError(
            f"column {name!r} has steps of {typical:g}: in no unit a sampling rate of 5 to 5000 Hz",
            where=source.name,
            hint="say the rate with --imu-rate-hz",
        )
    return np.asarray((values - values[0]) * _SECONDS[unit], dtype=np.float64)


def _time_unit(name: str, typical: float) -> str | None:
    words = re.findall(r"[a-zµ]+", name.lower().replace("µ", "u"))
    if words and (len(words) > 1 or words == ["seconds"]) and words[-1] in _UNIT_ENDINGS:
        return _UNIT_ENDINGS[words[-1]]
    for unit, seconds in _SECONDS.items():
        if 1 / 5000 <= typical * seconds < 1 / 5:
            return unit
    return None


def _fill(channels: Numbers, seconds: npt.NDArray[np.number], source: MediaSource) -> None:
    """Fills in missing numbers from their neighbours: sensors of different rates share a table.

    Raises:
        MediaError: a channel has no number at all, or one that no sensor gives.
    """
    for row in channels:
        good = np.isfinite(row)
        if not good.any():
            raise MediaError("has a channel without numbers", where=source.name)
        if np.abs(row[good]).max() > _MOST:
            raise MediaError(f"holds values beyond {_MOST:g}: no motion", where=source.name)
        if not good.all():
            row[~good] = np.interp(seconds[~good], seconds[good], row[good])


def read_window(
    source: MediaSource, options: MediaOptions, *, seconds: float, steps: int
) -> npt.NDArray[np.float32]:
    """Reads a window of motion, resampled linearly to equal steps.

    Of a longer recording the middle is taken, or what follows `options.imu_start_seconds`; after
    the end of a shorter one the last reading is held. A recording faster than the steps is averaged
    over each of them, so that vibrations do not fold into slow motion. A recording of just as many
    readings that does not say its rate is a ready window.

    Returns:
        [6, steps], as in `Motion`.

    Raises:
        MediaError: the rate is not known, the recording is too short, or see `open_motion`.
    """
    with open_motion(source, options) as motion:
        found = _resample(motion, options.imu_start_seconds, source, seconds, steps)
        return found.astype(np.float32)


def _resample(
    motion: Motion, start: float | None, source: MediaSource, span: float, steps: int
) -> Numbers:
    """The window, [6, steps]."""
    channels, seconds = motion
    step = span / steps
    if seconds is None:
        if channels.shape[1] != steps:
            raise MediaError(
                "does not say its sampling rate",
                where=source.name,
                hint="say it with --imu-rate-hz",
            )
        seconds = np.arange(steps, dtype=np.float64) * step
    if len(seconds) < 2:
        raise MediaError("holds fewer than two readings", where=source.name)
    rate = (len(seconds) - 1) / seconds[-1] if seconds[-1] > 0 else 0.0
    if rate <= 0:
        raise MediaError("has no usable time", where=source.name)
    length = seconds[-1] + 1 / rate
    if start is None:
        start = max(length - span, 0.0) / 2
    if start >= length:
        raise MediaError(
            f"is {length:.4g} s long: nothing is left from second {start:g} on", where=source.name
        )
    if rate * step <= 1.01:
        wanted = start + np.arange(steps) * step
        return np.stack([np.interp(wanted, seconds, row) for row in channels])
    # the mean over each step, from the running integral of the piecewise linear signal
    edges = np.asarray(start + (np.arange(steps + 1) - 0.5) * step, np.float64)
    return np.stack([_means(edges, seconds, row) for row in channels])


def _means(edges: Numbers, seconds: Numbers, row: Numbers) -> Numbers:
    """Means between successive edges of the line through (seconds, row), held at both ends."""
    at_edges = np.interp(edges, seconds, row)
    times = np.concatenate([seconds, edges])
    values = np.concatenate([row, at_edges])
    order = np.argsort(times, kind="stable")
    times, values = times[order], values[order]
    areas = np.concatenate([[0.0], np.cumsum(np.diff(times) * (values[1:] + values[:-1]) / 2)])
    integral = np.interp(edges, times, areas)
    return np.diff(integral) / np.diff(edges)

"""Motion recordings (accelerometer and gyroscope) -> the encoder's 5 s tensor.

ImageBind published no loader for motion; the window and the number of steps are the paper's, the
rules for reading files are ours and stand in `load_imu`.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import torch

from chatbind_cli.errors import MediaError
from chatbind_cli.media.arrays import read_npy
from chatbind_cli.media.modality import IMU_CHANNELS, IMU_SECONDS, IMU_STEPS
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import MediaSource
from chatbind_cli.media.tables import Columns, read_csv, read_parquet

Numbers = npt.NDArray[np.float64]

_GRAVITY = 9.80665
_MOST = 1e9
"""No sensor measures more, in any unit; broken files do, and would overflow."""

_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_UNIT_ENDINGS = (
    ("ns", "ns"), ("nanoseconds", "ns"), ("us", "us"), ("microseconds", "us"), ("ms", "ms"),
    ("msec", "ms"), ("milliseconds", "ms"), ("s", "s"), ("sec", "s"), ("secs", "s"),
    ("seconds", "s"),
)  # fmt: skip
_TIME_NAMES = frozenset({"t", "time", "timestamp", "timestamps", "ts", "seconds", "elapsed"})
_ACCEL = r"(?:linear)?(?:user)?(?:acceleration|accelerometer|accel|acc|acce|a)"
_GYRO = r"(?:angular(?:velocity|rate)|rotation(?:rate)?|gyroscope|gyro|gyr|omega|w|g)"


def load_imu(source: MediaSource, options: MediaOptions) -> torch.Tensor:
    """Reads 5 s of motion: accelerometer x, y, z in m/s^2, then gyroscope x, y, z in rad/s.

    CSV (with a header such as `timestamp,acc_x,acc_y,acc_z,gyro_x,gyro_y,gyro_z`; common spellings
    are known; without a header: six columns in that order, or seven with the time first), Parquet
    with such columns, or NPY of shape [6, steps] or [steps, 6]. `options.imu_accel_unit` `g` and
    `options.imu_gyro_unit` `deg/s` are converted.

    Time: a time column (its unit from its name, else the one that makes 5 to 5000 samples a
    second), or `options.imu_rate_hz`; an NPY array of 2000 steps needs neither, it is a ready
    window. Of a longer recording the middle 5 s are taken, or those from
    `options.imu_start_seconds`; after the end of a shorter one the last reading is held. Missing
    cells are filled in from their neighbours. The window is resampled to 2000 steps of 2.5 ms,
    linearly; a recording faster than that is averaged over each step, so that vibrations do not
    fold into slow motion.

    Returns:
        [6, 2000] float32.

    Raises:
        MediaError: columns are missing, the rate is not known, time runs backwards, or the file is
            broken, too short or too large.

    Source: ImageBind (Girdhar et al., 2023), section 4: 5 s windows of 2K time steps.
    """
    head = source.head(6)
    if head == b"\x93NUMPY":
        channels, time = _from_array(source, options), None
    elif head[:4] == b"PAR1":
        columns = read_parquet(source, options.max_array_bytes)
        channels, time = _by_name(columns, source)
    else:
        columns, named = read_csv(source, options.max_array_bytes)
        channels, time = _by_name(columns, source) if named else _by_order(columns, source)
    scale = np.ones((IMU_CHANNELS, 1))
    scale[:3] = _GRAVITY if options.imu_accel_unit == "g" else 1.0
    scale[3:] = np.pi / 180 if options.imu_gyro_unit == "deg/s" else 1.0
    seconds = _clock(channels.shape[1], time, source, options)
    window = _resample(_fill(channels * scale, seconds, source), seconds, options, source)
    return torch.from_numpy(window.astype(np.float32))


def _from_array(source: MediaSource, options: MediaOptions) -> Numbers:
    array = read_npy(source, options.max_array_bytes)
    if array.ndim == 2 and array.shape[0] == IMU_CHANNELS:
        return array.astype(np.float64)
    if array.ndim == 2 and array.shape[1] == IMU_CHANNELS:
        return array.T.astype(np.float64)
    raise MediaError(
        f"is an array of shape {list(array.shape)}, not [6, steps] or [steps, 6]",
        where=source.name,
    )


def _by_name(columns: Columns, source: MediaSource) -> tuple[Numbers, tuple[str, Numbers] | None]:
    """The six channels and the time column (name, values), by their names."""
    found: dict[str, str] = {}
    time: tuple[str, Numbers] | None = None
    for name in columns:
        channel = _channel(name)
        if channel == "time":
            time = time if time is not None else (name, columns[name])
        elif channel is not None:
            if channel in found:
                raise MediaError(
                    f"columns {found[channel]!r} and {name!r} both look like {channel}",
                    where=source.name,
                )
            found[channel] = name
    wanted = [f"{sensor} {axis}" for sensor in ("accelerometer", "gyroscope") for axis in "xyz"]
    missing = [channel for channel in wanted if channel not in found]
    if missing:
        raise MediaError(
            f"has no column for {', '.join(missing)}",
            where=source.name,
            hint="name them acc_x, acc_y, acc_z, gyro_x, gyro_y, gyro_z (and timestamp)",
        )
    return np.stack([columns[found[channel]] for channel in wanted]), time


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


def _by_order(columns: Columns, source: MediaSource) -> tuple[Numbers, tuple[str, Numbers] | None]:
    values = list(columns.values())
    if len(values) == IMU_CHANNELS:
        return np.stack(values), None
    if len(values) == IMU_CHANNELS + 1:
        return np.stack(values[1:]), ("time", values[0])
    raise MediaError(
        f"has {len(values)} columns and no header",
        where=source.name,
        hint="six columns (acc x y z, gyro x y z), or seven with the time first",
    )


def _clock(
    count: int,
    time: tuple[str, Numbers] | None,
    source: MediaSource,
    options: MediaOptions,
) -> Numbers:
    """The time of each sample in seconds, starting at 0."""
    if options.imu_rate_hz is not None:
        return np.arange(count, dtype=np.float64) / options.imu_rate_hz
    if time is None:
        if count == IMU_STEPS:
            return np.arange(count, dtype=np.float64) * (IMU_SECONDS / IMU_STEPS)
        raise MediaError(
            "does not say its sampling rate", where=source.name, hint="say it with --imu-rate-hz"
        )
    name, values = time
    if count < 2 or not np.isfinite(values).all():
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
    for ending, unit in _UNIT_ENDINGS:
        if words[-1:] == [ending] and (len(words) > 1 or ending == "seconds"):
            return unit
    for unit, seconds in _SECONDS.items():
        if 1 / 5000 <= typical * seconds < 1 / 5:
            return unit
    return None


def _fill(channels: Numbers, seconds: Numbers, source: MediaSource) -> Numbers:
    """Missing numbers from their neighbours in time: sensors of different rates share a table.

    Raises:
        MediaError: a channel has no number at all, or one that no sensor gives.
    """
    filled = channels.copy()
    for row in filled:
        good = np.isfinite(row)
        if not good.any():
            raise MediaError("has a channel without numbers", where=source.name)
        if np.abs(row[good]).max() > _MOST:
            raise MediaError(f"holds values beyond {_MOST:g}: no motion", where=source.name)
        if not good.all():
            row[~good] = np.interp(seconds[~good], seconds[good], row[good])
    return filled


def _resample(
    channels: Numbers, seconds: Numbers, options: MediaOptions, source: MediaSource
) -> Numbers:
    """[6, samples] at `seconds` -> [6, 2000] of the window."""
    if len(seconds) < 2:
        raise MediaError("holds fewer than two readings", where=source.name)
    step = IMU_SECONDS / IMU_STEPS
    rate = (len(seconds) - 1) / seconds[-1] if seconds[-1] > 0 else 0.0
    if rate <= 0:
        raise MediaError("has no usable time", where=source.name)
    length = seconds[-1] + 1 / rate
    start = options.imu_start_seconds
    if start is None:
        start = max(length - IMU_SECONDS, 0.0) / 2
    if start >= length:
        raise MediaError(
            f"is {length:.4g} s long: nothing is left from second {start:g} on", where=source.name
        )
    wanted = start + np.arange(IMU_STEPS) * step
    if rate * step <= 1.01:
        return np.stack([np.interp(wanted, seconds, row) for row in channels])
    # the mean over each step, from the running integral of the piecewise linear signal
    edges = np.asarray(start + (np.arange(IMU_STEPS + 1) - 0.5) * step, dtype=np.float64)
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

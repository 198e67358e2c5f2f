from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from chatbind_cli.encoders.imagebind.imu import load_imu
from chatbind_cli.errors import MediaError
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import open_source
from tests.recordings import npy

NAMES = ("acc_x", "acc_y", "acc_z", "gyro_x", "gyro_y", "gyro_z")


def load(data: bytes | Path, **options: object) -> torch.Tensor:
    return load_imu(open_source(data), MediaOptions(**options))  # type: ignore[arg-type]


def wave(times: np.ndarray) -> np.ndarray:
    """Six slow waves, [6, len(times)]; linear interpolation at 100 Hz keeps them within 0.01."""
    return np.stack([np.sin(2 * np.pi * 0.3 * (i + 1) * times + i) for i in range(6)])


def csv(
    times: np.ndarray | None, channels: np.ndarray, header: str | None = "", cut: str = ","
) -> bytes:
    rows = channels.T if times is None else np.column_stack([times, channels.T])
    names = NAMES if times is None else ("timestamp", *NAMES)
    lines = [cut.join(f"{value:.9g}" for value in row) for row in rows]
    if header is not None:
        lines.insert(0, header or cut.join(names))
    return ("\n".join(lines) + "\n").encode()


TIMES = np.arange(500) / 100
STEPS = np.arange(2000) * 0.0025
TARGET = torch.from_numpy(wave(np.minimum(STEPS, TIMES[-1])).astype(np.float32))


def assert_wave(tensor: torch.Tensor) -> None:
    assert tensor.shape == (6, 2000) and tensor.dtype == torch.float32
    torch.testing.assert_close(tensor, TARGET, rtol=0, atol=0.01)


def test_a_ready_window_is_passed_through_unchanged() -> None:
    window = np.random.default_rng(0).normal(size=(6, 2000)).astype(np.float32)
    for array in (window, window.T, window[None], np.asfortranarray(window)):
        assert torch.equal(load(npy(array)), torch.from_numpy(window))


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6, 1e9])
@pytest.mark.parametrize("offset", [0.0, 1.6e9])
def test_the_unit_of_time_is_found_from_its_steps(scale: float, offset: float) -> None:
    times = (TIMES + offset) * scale
    rows = "\n".join(
        ",".join([f"{time:.0f}" if scale > 1 else f"{time:.4f}", *(f"{v:.7f}" for v in row)])
        for time, row in zip(times, wave(TIMES).T, strict=True)
    )
    assert_wave(load(("timestamp," + ",".join(NAMES) + "\n" + rows).encode()))


@pytest.mark.parametrize(
    "header",
    [
        "t,ax,ay,az,gx,gy,gz",
        "Time (s),Accel_X (m/s^2),Accel_Y (m/s^2),Accel_Z (m/s^2),Gyro_X,Gyro_Y,Gyro_Z",
        "timestamp,accelerometer.x,accelerometer.y,accelerometer.z,gyroscope.x,gyroscope.y,gyroscope.z",
        "seconds_elapsed,linear_acceleration_x,linear_acceleration_y,linear_acceleration_z,"
        "angular_velocity_x,angular_velocity_y,angular_velocity_z",
        '"time","X_ACC","Y_ACC","Z_ACC","X_GYR","Y_GYR","Z_GYR"',
        "timestamp_s,accX,accY,accZ,gyrX,gyrY,gyrZ",
        "Timestamp,acceleration-x,acceleration-y,acceleration-z,rotationRate-x,rotationRate-y,"
        "rotationRate-z",
        "time,imu_acc_x_mps2,imu_acc_y_mps2,imu_acc_z_mps2,imu_gyr_x_rads,imu_gyr_y_rads,"
        "imu_gyr_z_rads",
        "ts,wx_,a_x,a_y,a_z,w_x,w_y,w_z".replace("wx_,", ""),
    ],
)
def test_common_spellings_of_headers_are_known(header: str) -> None:
    assert_wave(load(csv(TIMES, wave(TIMES), header)))


def test_columns_are_found_by_name_whatever_their_order_and_company() -> None:
    order = [5, 3, 4, 1, 0, 2]
    lines = ["label," + ",".join(NAMES[i] for i in order) + ",temperature,time"]
    for time, row in zip(TIMES, wave(TIMES).T, strict=True):
        lines.append("walk," + ",".join(f"{row[i]:.7f}" for i in order) + f",20,{time:.3f}")
    assert_wave(load("\r\n".join(lines).encode("utf-8-sig")))


@pytest.mark.parametrize("cut", [",", ";", "\t", " ", "   "])
def test_every_separator_is_read_with_and_without_header(cut: str) -> None:
    assert_wave(load(csv(TIMES, wave(TIMES), None, cut)))
    assert_wave(load(csv(TIMES, wave(TIMES), "", cut)))
    comment = b"# device 7\n\n" + csv(None, wave(TIMES), None, cut)
    assert_wave(load(comment, imu_rate_hz=100.0))


def test_parquet_is_read_with_seconds_and_with_timestamps() -> None:
    columns = dict(zip(NAMES, wave(TIMES), strict=True))
    stamps = pa.array((1_700_000_000_000_000_000 + TIMES * 1e9).astype("int64"), pa.timestamp("ns"))
    for time in (pa.array(TIMES), stamps, stamps.cast(pa.timestamp("us"), safe=False)):
        buffer = io.BytesIO()
        table = pa.table({"timestamp": time, "note": ["x"] * 500, **columns})
        pyarrow.parquet.write_table(table, buffer)
        assert_wave(load(buffer.getvalue()))


def test_units_are_converted() -> None:
    ones = np.ones((6, 2000))
    tensor = load(npy(ones), imu_accel_unit="g", imu_gyro_unit="deg/s")
    torch.testing.assert_close(tensor[:3], torch.full((3, 2000), 9.80665))
    torch.testing.assert_close(tensor[3:], torch.full((3, 2000), np.pi / 180))


def test_a_short_recording_holds_its_last_reading() -> None:
    times = np.arange(200) / 100
    tensor = load(csv(times, wave(times)))
    torch.testing.assert_close(tensor[:, :796], TARGET[:, :796], rtol=0, atol=0.01)
    last = torch.from_numpy(wave(times)[:, -1:].astype(np.float32)).expand(6, 1204)
    torch.testing.assert_close(tensor[:, 796:], last, rtol=0, atol=1e-6)


def test_of_a_long_recording_the_middle_or_the_wanted_window_is_taken() -> None:
    times = np.arange(2500) / 100
    data = csv(times, np.stack([times] * 6))
    middle, wanted = load(data), load(data, imu_start_seconds=3.0)
    expected = torch.from_numpy(STEPS.astype(np.float32)).expand(6, 2000)
    torch.testing.assert_close(middle, expected + 10.0, rtol=0, atol=1e-3)
    torch.testing.assert_close(wanted, expected + 3.0, rtol=0, atol=1e-3)
    with pytest.raises(MediaError, match="25 s long: nothing is left from second 25 on"):
        load(data, imu_start_seconds=25.0)


def test_fast_vibrations_do_not_fold_into_slow_motion() -> None:
    times = np.arange(5 * 4000) / 4000
    slow, buzz = np.sin(2 * np.pi * times), np.sin(2 * np.pi * 1599.0 * times)
    tensor = load(npy(np.stack([slow + buzz] * 6)), imu_rate_hz=4000.0)
    expected = torch.from_numpy(np.sin(2 * np.pi * STEPS).astype(np.float32))
    # picking every tenth sample would leave a full wave of 1 Hz: an error of 1
    assert (tensor[0, 2:-2] - expected[2:-2]).abs().max() < 0.12


def test_means_over_steps_equal_a_plain_loop() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(6, 10_000))
    tensor = load(npy(values), imu_rate_hz=2000.0).numpy()
    fine = np.interp(np.arange(-2500, 5_002_500) / 1e6, np.arange(10_000) / 2000, values[2])
    # the mean of a fine sampling of the line, a microsecond apart, around each 2.5 ms step
    for step in (1, 2, 777, 1998):
        centre = 2500 + step * 2500
        around = fine[centre - 1250 : centre + 1251]
        mean = (around.sum() - (around[0] + around[-1]) / 2) / 2500
        assert tensor[2, step] == pytest.approx(mean, abs=1e-4)


def test_missing_cells_come_from_their_neighbours() -> None:
    lines = csv(TIMES, wave(TIMES)).decode().splitlines()
    for i in range(1, len(lines) - 1):
        cells = lines[i].split(",")
        if i % 2:  # two sensors take turns
            cells[1:4] = ["", "nan", "NaN"]
        else:
            cells[4:] = ["", "", "inf"]
        lines[i] = ",".join(cells)
    torch.testing.assert_close(load("\n".join(lines).encode()), TARGET, rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (csv(None, wave(TIMES)), "does not say its sampling rate; say it with --imu-rate"),
        (npy(np.ones((6, 500))), "does not say its sampling rate"),
        (npy(np.ones((7, 500))), r"shape \[7, 500\]"),
        (npy(np.ones((6, 500, 2))), r"shape \[6, 500, 2\]"),
        (npy(np.full((6, 2000), np.nan)), "a channel without numbers"),
        (csv(TIMES[::-1], wave(TIMES)), "time runs backwards at row 2"),
        (csv(TIMES * 0, wave(TIMES)), "steps of 0"),
        (csv(np.full(500, np.nan), wave(TIMES)), "no usable time in column 'timestamp'"),
        (csv(TIMES[:1], wave(TIMES[:1])), "no usable time"),
        (csv(TIMES, wave(TIMES), "time,ax,ay,az,gx,gy,depth"), "no column for gyroscope z"),
        (csv(TIMES, wave(TIMES), "time,ax,ay,az,gx,gy,acc_x"), "both look like accelerometer x"),
        (b"1,2,3\n4,5,6\n", "3 columns and no header"),
        (b"a,b\n1,2,3\n", "not a readable CSV table"),
        (b"1,2,3,4,5,6\n1,2,3,4,5,6,\xc3", "not a readable CSV table"),
        (b"t,ax,ay,az,gx,gy,gz\n", "no rows|not a readable"),
        (b"\n\n", "holds no table"),
        (b"\xff\xfe\x00binary", "is not text"),
        (b"PAR1 and then nothing of it", "not a readable Parquet file"),
        (",".join(["x"] * 5000).encode(), "more than 1000 columns"),
    ],
)
def test_unusable_recordings_are_one_line(data: bytes, what: str) -> None:
    with pytest.raises(MediaError, match=what) as caught:
        load(data)
    assert "\n" not in str(caught.value)


def test_tables_beyond_the_limit_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.csv"
    with path.open("wb") as file:
        file.write(b"t,ax,ay,az,gx,gy,gz\n")
        file.truncate(10**10)
    with pytest.raises(MediaError, match="larger than 256 MiB"):
        load(path)


def test_a_parquet_bomb_is_refused_by_its_own_count() -> None:
    zeros = pa.array(np.zeros(2_000_000))
    buffer = io.BytesIO()
    table = pa.table(dict.fromkeys(NAMES, zeros))
    pyarrow.parquet.write_table(table, buffer, compression="zstd")
    assert len(buffer.getvalue()) < 100_000
    with pytest.raises(MediaError, match="larger than 50 MiB"):
        load(buffer.getvalue(), max_array_bytes=50 * 2**20)

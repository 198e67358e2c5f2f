from __future__ import annotations

import numpy as np
import pytest
import torch

from chatbind_cli.encoders.imagebind.planes import load_depth, load_thermal
from chatbind_cli.errors import MediaError
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import open_source
from tests.recordings import image_file, npy

FOCAL_TIMES_BASELINE = 0.075 * 518.857901


def load(data: bytes, **options: object) -> torch.Tensor:
    return load_depth(open_source(data), MediaOptions(**options))  # type: ignore[arg-type]


def expected(metres: float) -> float:
    return (FOCAL_TIMES_BASELINE / metres - 24.82) / 14.40


def flat(metres: float, shape: tuple[int, int] = (48, 64)) -> np.ndarray:
    return np.full(shape, metres)


def test_millimetres_and_metres_of_the_same_wall_are_the_same_disparity() -> None:
    wall = flat(1.5)
    tensors = [
        load(image_file((wall * 1000).astype(np.uint16))),
        load(image_file((wall * 1000).astype(np.uint16), "TIFF")),
        load(npy((wall * 1000).astype(np.uint16))),
        load(npy((wall * 1000).astype(">i4"))),
        load(npy(wall.astype(np.float32))),
        load(npy(wall[None, :, :, None])),
        load(npy(np.asfortranarray(wall))),
        load(image_file(wall.astype(np.float32), "TIFF")),
        load(npy(wall * 1000), depth_unit="mm"),
        load(npy(np.full((48, 64), FOCAL_TIMES_BASELINE / 1.5)), depth_unit="disparity"),
    ]
    for tensor in tensors:
        assert tensor.shape == (1, 224, 224) and tensor.dtype == torch.float32
        torch.testing.assert_close(
            tensor, torch.full((1, 224, 224), expected(1.5)), rtol=1e-4, atol=1e-4
        )


def test_sensor_constants_scale_the_disparity() -> None:
    data = npy(flat(2.0))
    near = load(data, depth_baseline_m=0.095, depth_focal_px=570.0)
    assert near[0, 0, 0].item() == pytest.approx((0.095 * 570 / 2 - 24.82) / 14.4, rel=1e-4)


def test_near_things_have_the_larger_disparity_and_keep_their_place() -> None:
    room = flat(4.0, (300, 400))
    room[:150] = 1.0  # the near half is above
    tensor = load(npy(room))[0]
    torch.testing.assert_close(tensor[50], torch.full((224,), expected(1.0)))
    torch.testing.assert_close(tensor[-50], torch.full((224,), expected(4.0)))


@pytest.mark.parametrize("hole", [0.0, np.nan, np.inf, -np.inf, -1.0])
def test_where_nothing_was_measured_it_is_far(hole: float) -> None:
    room = flat(1.0, (224, 224))
    room[:100] = hole
    tensor = load(npy(room))[0]
    torch.testing.assert_close(tensor[50], torch.full((224,), expected(8.0)))
    torch.testing.assert_close(tensor[150], torch.full((224,), expected(1.0)))


@pytest.mark.parametrize(("metres", "seen"), [(100.0, 8.0), (0.001, FOCAL_TIMES_BASELINE / 600)])
def test_depths_outside_the_sensors_range_are_cut(metres: float, seen: float) -> None:
    assert load(npy(flat(metres)))[0, 0, 0].item() == pytest.approx(expected(seen), rel=1e-4)


def test_an_estimators_inverse_depth_is_normalised_by_itself() -> None:
    ramp = np.tile(np.linspace(10, 200, 224), (224, 1)).astype(np.uint8)
    tensor = load(image_file(ramp), depth_unit="relative")
    assert abs(tensor.mean().item()) < 1e-3 and abs(tensor.std().item() - 1) < 1e-2
    flat = load(image_file(np.full((9, 9), 7, np.uint8)), depth_unit="relative")
    torch.testing.assert_close(flat.sum(), torch.tensor(0.0))


def test_an_eight_bit_picture_needs_its_unit() -> None:
    with pytest.raises(MediaError, match="says nothing of its unit; say it with --depth-unit"):
        load(image_file(np.full((9, 9), 7, np.uint8)))


@pytest.mark.parametrize(
    "values", [np.zeros((4, 4), np.uint16), np.full((4, 4), np.nan), np.full((4, 4), -np.inf)]
)
def test_a_map_without_a_measurement_is_refused(values: np.ndarray) -> None:
    with pytest.raises(MediaError, match="no measured depth"):
        load(npy(values))


@pytest.mark.parametrize("values", [np.ones((3, 4, 5)), np.ones(7), np.ones(())])
def test_an_array_that_is_no_map_is_refused(values: np.ndarray) -> None:
    with pytest.raises(MediaError, match="not .height, width."):
        load(npy(values))


def test_too_many_pixels_are_refused() -> None:
    with pytest.raises(MediaError, match="more than 10 pixels"):
        load(npy(np.ones((4, 4))), max_pixels=10)


@pytest.mark.parametrize("shape", [(3, 20_000), (20_000, 3), (1, 2)])
def test_slivers_are_cropped_before_they_are_enlarged(shape: tuple[int, int]) -> None:
    tensor = load(
        npy(np.full(shape, 2.0)) if 1 not in shape else image_file(np.full(shape, 2000, "u2"))
    )
    torch.testing.assert_close(tensor, torch.full((1, 224, 224), expected(2.0)))


def heat(data: bytes) -> torch.Tensor:
    return load_thermal(open_source(data), MediaOptions())


def stored(values: np.ndarray, kind: str = "PNG") -> bytes:
    return npy(values) if kind == "NPY" else image_file(values, kind)


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
    tensor = heat(data)
    assert tensor.shape == (1, 224, 224) and tensor.dtype == torch.float32
    # 8-bit storage rounds down by up to 1/255
    assert (tensor[0] - torch.from_numpy(WARM)).abs().max() <= 1 / 254
    assert tensor.min() >= 0 and tensor.max() <= 1


def test_the_short_side_becomes_224_and_the_centre_stays() -> None:
    picture = np.zeros((100, 300), np.uint8)
    picture[:, 100:200] = 255
    tensor = heat(stored(picture))
    torch.testing.assert_close(tensor[..., 20:-20], torch.ones(1, 224, 184))


def test_temperatures_are_not_guessed() -> None:
    with pytest.raises(MediaError, match=r"outside \[0, 1\]; scale temperatures"):
        heat(stored(WARM * 300, "NPY"))
    with pytest.raises(MediaError, match=r"outside \[0, 1\]"):
        heat(stored(np.full((4, 4), np.nan), "NPY"))


def test_signed_numbers_below_zero_are_cold() -> None:
    assert heat(stored(np.full((4, 4), -5, np.int16), "NPY")).max() == 0


@pytest.mark.parametrize("data", [b"no picture", stored(np.ones((2, 3, 4)), "NPY")])
def test_what_is_no_thermal_picture_is_refused(data: bytes) -> None:
    with pytest.raises(MediaError):
        heat(data)

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from chatbind_cli.errors import UsageError
from chatbind_cli.media.modality import MODALITIES
from chatbind_cli.media.options import FIELDS, MediaOptions


def test_each_option_changes_the_fingerprints_of_exactly_the_modalities_it_touches() -> None:
    touched = {
        "audio_clips": ("audio", 5),
        "video_clips": ("video", 3),
        "clip_seconds": ("video audio", 1.0),
        "clip_sampler": ("video audio", "chatbind"),
        "fps": ("video", 2.0),
        "start": ("video audio", 1.0),
        "end": ("video audio", 1.0),
        "depth_unit": ("depth", "m"),
        "depth_baseline_m": ("depth", 0.095),
        "depth_focal_px": ("depth", 600.0),
        "imu_rate_hz": ("imu", 50.0),
        "imu_start_seconds": ("imu", 1.0),
        "imu_accel_unit": ("imu", "g"),
        "imu_gyro_unit": ("imu", "deg/s"),
        "max_pixels": ("", 10),
        "max_array_bytes": ("", 10),
    }
    assert set(touched) == {field.name for field in fields(MediaOptions)}
    base = MediaOptions()
    for name, (modalities, value) in touched.items():
        other = replace(base, **{name: value})
        changed = {m for m in MODALITIES if base.fingerprint(m) != other.fingerprint(m)}
        assert changed == set(modalities.split()), name
        assert {m for m in MODALITIES if name in FIELDS[m]} == changed, name
        kept = other.only(() if modalities else [name])
        assert kept == (base if modalities else other), name


def test_fingerprints_are_stable_across_releases() -> None:
    options = MediaOptions()
    assert options.fingerprint("image") == "image/v1"
    assert options.fingerprint("video") == "video/v1/5/2.0/imagebind"
    assert MediaOptions(start=0.0).fingerprint("video") == options.fingerprint("video")
    cut = MediaOptions(start=1, end=7.5, fps=1)
    assert cut.fingerprint("audio") == "audio/v1/3/2.0/imagebind/start=1.0/end=7.5"
    assert cut.fingerprint("video") == "video/v1/5/2.0/imagebind/fps=1.0/start=1.0/end=7.5"
    assert options.fingerprint("imu") == "imu/v1/None/None/m/s2/rad/s"


def test_the_library_sampler_and_ours_of_the_same_spacing_share_a_fingerprint() -> None:
    ours, library = MediaOptions(clip_sampler="chatbind"), MediaOptions(clip_sampler="pytorchvideo")
    assert ours.fingerprint("audio") == library.fingerprint("audio")


@pytest.mark.parametrize(
    "bad",
    [
        {"clip_sampler": "random"},
        {"depth_unit": "feet"},
        {"audio_clips": 0},
        {"clip_seconds": -1.0},
        {"imu_rate_hz": 0.0},
        {"clip_seconds": float("nan")},
        {"fps": 0.0},
        {"start": -1.0},
        {"end": 2.0, "start": 2.0},
    ],
)
def test_a_wrong_option_is_a_usage_error_that_names_it(bad: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        MediaOptions(**bad)  # type: ignore[arg-type]


def test_an_unknown_modality_has_no_fingerprint() -> None:
    with pytest.raises(ValueError, match="smell"):
        MediaOptions().fingerprint("smell")

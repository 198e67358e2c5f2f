from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from chatbind_cli.encoders.imagebind.clips import spread_clips
from chatbind_cli.errors import UsageError


@pytest.mark.parametrize(
    ("golden_name", "sampler"),
    [
        ("pytorchvideo_git_6cdc929_and_28fe037 (ImageBind's pins)", "imagebind"),
        ("pytorchvideo_pypi_0.1.5", "chatbind"),
        ("pytorchvideo_pypi_0.1.5", "pytorchvideo"),
    ],
)
def test_clips_start_exactly_where_the_reference_puts_them(
    golden: Path, golden_name: str, sampler: str
) -> None:
    if sampler == "pytorchvideo":
        pytest.importorskip("pytorchvideo.data.clip_sampling")
    cases = json.loads((golden / "preprocess/clip_timepoints.json").read_text())[golden_name]
    assert len(cases) >= 20
    for case in cases.values():
        clips = spread_clips(
            case["duration"], count=case["clips_per_video"], seconds=2.0, sampler=sampler
        )
        assert [start for start, _ in clips] == [Fraction(*f) for f in case["start_fraction"]]
        slices = [[int(start * 16000), int(end * 16000)] for start, end in clips]
        assert slices == case["audio_sample_slice_16k"]


def test_one_clip_starts_at_the_beginning() -> None:
    assert [start for start, _ in spread_clips(9.0, count=1, seconds=2.0)] == [0]


def test_the_missing_library_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorchvideo.data.clip_sampling", None)
    with pytest.raises(UsageError, match=r"chatbind\[pytorchvideo\]"):
        spread_clips(9.0, count=3, seconds=2.0, sampler="pytorchvideo")

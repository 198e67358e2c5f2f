"""The configuration: its JSON form, its presets, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chatbind_cli.encoders.imagebind.config import HUGE, ImageBindConfig, is_imagebind_config
from chatbind_cli.errors import CheckpointError, WeightsError


def test_the_reference_config_is_read_and_written_back_equal(golden: Path, tmp_path: Path) -> None:
    source = golden / "imagebind_small" / "config.json"
    config = ImageBindConfig.from_json(source)
    assert config.kernel_size == (2, 14, 14)
    assert config.trunk("thermal") == (48, 2, 4)
    assert json.loads(source.read_text()).items() <= config.to_dict().items()

    copy = tmp_path / "config.json"
    copy.write_text(config.to_json())
    assert ImageBindConfig.from_json(copy) == config


def test_an_empty_config_is_huge(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert ImageBindConfig.from_json(tmp_path / "config.json") == HUGE


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"vision_width": 3}, "'vision_width' is no setting of ImageBind"),
        ({"imu_num_heads": 2.5}, "imu_num_heads must be a whole number, not 2.5"),
        ({"imu_num_heads": True}, "imu_num_heads must be a whole number, not True"),
        ({"kernel_size": [2, 14]}, "kernel_size must be 3 whole numbers"),
        ({"audio_drop_path": 1.5}, "audio_drop_path must be in [0, 1), not 1.5"),
        ({"text_num_blocks": 0}, "text_num_blocks must be positive, not 0"),
        ({"depth_num_heads": 7}, "depth_embed_dim 384 does not divide into 7 heads"),
        ({"video_frames": 3}, "video_frames 3 does not divide by the 2 frames of a patch"),
    ],
)
def test_a_wrong_setting_is_named_with_its_file(
    values: dict[str, object], what: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(WeightsError) as error:
        ImageBindConfig.from_json(path)
    assert str(error.value) == f"{path}: {what}"


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_file_that_is_no_config_is_an_error_of_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json: [^\n]+$"):
        ImageBindConfig.from_json(path)
    assert not is_imagebind_config(path)


def test_a_config_of_another_library_is_not_taken_for_one(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "clip", "hidden_size": 1024}')
    assert not is_imagebind_config(path)
    path.write_text(HUGE.to_json())
    assert is_imagebind_config(path)

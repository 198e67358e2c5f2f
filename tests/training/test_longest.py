"""Samples are no longer than what the language model can read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chatbind_cli.errors import UsageError
from chatbind_cli.training.longest import longest_sample

LINEAR = {"type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}


def model(folder: Path, tokenizer: object = 10**30, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": tokenizer}))
    return folder


@pytest.mark.parametrize(
    ("config", "most"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"text_config": {"max_position_embeddings": 1024}}, 1024),
        ({"max_position_embeddings": 512, "rope_scaling": LINEAR}, 2048),
        ({"max_position_embeddings": 1000, "rope_parameters": YARN}, 4000),
        ({"max_position_embeddings": 5000, "rope_parameters": YARN}, 5000),
        ({"max_position_embeddings": 512, "rope_parameters": {"rope_theta": 1e4}}, 512),
        ({"max_seq_len": 700}, 700),
    ],
)
def test_the_model_s_positions_are_the_most(tmp_path: Path, config, most: int, capsys) -> None:
    folder = model(tmp_path, **config)
    assert longest_sample(folder, None) == min(2048, most)
    assert ("are cut at" in capsys.readouterr().err) == (most < 2048)
    assert longest_sample(folder, most) == most
    with pytest.raises(UsageError, match=f"than the {most} tokens .*; leave it out, or say at"):
        longest_sample(folder, most + 1)


def test_a_tokenizer_s_word_is_a_default(tmp_path: Path) -> None:
    folder = model(tmp_path, 300, max_position_embeddings=4096)
    assert longest_sample(folder, None) == 300
    assert longest_sample(folder, 4096) == 4096


def test_where_nobody_says_the_published_length_holds(tmp_path: Path, capsys) -> None:
    assert longest_sample(tmp_path / "none", None) == 2048
    assert longest_sample(model(tmp_path, "long"), 10_000) == 10_000
    assert capsys.readouterr().err == ""

"""Retrieval between modalities, and what a file of pairs may say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from chatbind_cli.data.pairs import EncodedPairs, plot_retrieval, read_pairs, retrieval
from chatbind_cli.errors import RecordError


def pairs(first: torch.Tensor, second: torch.Tensor, kinds: list[int]) -> EncodedPairs:
    return EncodedPairs(
        ("image", "audio"),
        functional.normalize(first, dim=-1),
        functional.normalize(second, dim=-1),
        torch.tensor(kinds),
    )


def test_a_sense_that_agrees_is_found_and_one_that_does_not_is_chance() -> None:
    torch.manual_seed(0)
    things = torch.randn(40, 64)
    bound = retrieval(pairs(things, things + 0.1 * torch.randn(40, 64), list(range(40))))
    assert bound["recall_at_1"] == bound["recall_back_at_5"] == 1.0
    assert bound["outlook"] == "good"
    assert bound["gap"] < 0.1
    unbound = retrieval(pairs(things, torch.randn(40, 64), list(range(40))))
    assert unbound["recall_at_1"] < 0.2
    assert unbound["outlook"] == "poor"
    assert unbound["chance_at_1"] == pytest.approx(1 / 40)
    assert unbound["chance_at_5"] == pytest.approx(5 / 40)


def test_pairs_of_one_class_are_the_same_thing() -> None:
    # four things of two classes; the second senses are swapped within the classes
    first = torch.eye(4)
    second = first[[1, 0, 3, 2]]
    assert retrieval(pairs(first, second, [0, 1, 2, 3]))["recall_at_1"] == 0.0
    same = retrieval(pairs(first, second, [0, 0, 1, 1]))
    assert same["recall_at_1"] == 1.0
    assert same["chance_at_1"] == 0.5
    assert same["chance_at_5"] == 1.0  # there are only four


def test_recall_is_not_the_same_both_ways() -> None:
    # all first media lie nearest to one of the second
    first = torch.tensor([[1.0, 0.1], [1.0, 0.2], [1.0, 0.3]])
    second = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    found = retrieval(pairs(first, second, [0, 1, 2]))
    assert found["recall_at_1"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["recall_back_at_1"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["recall_back_at_5"] == 1.0


@pytest.mark.parametrize(
    "record",
    [{"image": "a.png"}, {"image": ["a.png", "b.png"]}, {"image": "a.png", "audio": [1]}],
)
def test_a_record_that_is_no_pair_is_refused(tmp_path: Path, record: dict) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(RecordError, match=r"pairs.jsonl:1"):
        list(read_pairs(path))


def test_the_first_modality_does_not_hang_on_the_order_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"audio": "a.wav", "class": 3, "image": "a.png"}\n')
    (pair,) = read_pairs(path)
    assert (pair.first.modality, pair.second.modality, pair.kind) == ("image", "audio", "3")


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    found = [retrieval(pairs(torch.eye(3), torch.eye(3), [0, 1, 2]))]
    plot_retrieval(found, tmp_path / "pairs.png")
    assert (tmp_path / "pairs.png").read_bytes().startswith(b"\x89PNG")

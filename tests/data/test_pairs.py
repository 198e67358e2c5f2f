"""Retrieval between modalities, and what a file of pairs may say."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.nn import functional

from chatbind_cli.data.encoding import EncodingOptions
from chatbind_cli.data.pairs import (
    EncodedPairs,
    Pair,
    compare_encoders,
    plot_retrieval,
    read_pairs,
    retrieval,
)
from chatbind_cli.encoders.encoder import Decoded, Encoder
from chatbind_cli.errors import ChatBindError, RecordError
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.root import MediaRoot
from chatbind_cli.media.source import MediaSource


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
def test_a_record_that_is_no_pair_is_an_error_among_the_others(
    tmp_path: Path, record: dict
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f'{json.dumps(record)}\nno JSON\n{{"image": "a.png", "audio": "a.wav"}}\n')
    bad, worse, good = read_pairs(path)
    assert isinstance(bad, RecordError) and "pairs.jsonl:1" in str(bad)
    assert isinstance(worse, RecordError) and "pairs.jsonl:2" in str(worse)
    assert isinstance(good, Pair)


def test_the_first_modality_does_not_hang_on_the_order_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"audio": "a.wav", "class": 3, "image": "a.png"}\n')
    (pair,) = read_pairs(path)
    assert isinstance(pair, Pair)
    assert (pair.first.modality, pair.second.modality, pair.kind) == ("image", "audio", "3")


class Bytes(Encoder):
    """Embeds a file as its first bytes, or, where it is told to, as what has nothing of it."""

    def __init__(self, name: str, modalities: tuple[str, ...], deaf: bool = False) -> None:
        super().__init__(
            reference=f"bytes:{name}",
            name=name,
            device=torch.device("cpu"),
            dtype=torch.float32,
            batch_size=1,
            attn_implementation="auto",
        )
        self.known, self.deaf, self.decoded = modalities, deaf, 0
        self.licence = "MIT" if deaf else None

    sha256 = "0123456789abcdef" * 4
    settings: ClassVar[dict[str, Any]] = {}
    embedding_dim = 8
    modalities = property(lambda self: self.known)

    def read(self, source: MediaSource, modality: str, options: MediaOptions) -> torch.Tensor:
        self.decoded += 1
        with source.open() as file:
            return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).float()

    def load_tower(self, modality: str) -> torch.nn.Module:
        return torch.nn.Identity()

    def run(self, modality: str, batch: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(batch) if self.deaf and modality == "audio" else batch - 128


@pytest.fixture
def things(tmp_path: Path) -> list[Pair]:
    """Pairs of a picture with a sound and with a motion recording, of the same bytes."""
    torch.manual_seed(0)
    lines = []
    for number in range(6):
        data = bytes(torch.randint(256, (8,)).tolist())
        for kind in ("png", "wav", "csv"):
            (tmp_path / f"{number}.{kind}").write_bytes(data)
        lines.append({"image": f"{number}.png", "audio": f"{number}.wav"})
        lines.append({"image": f"{number}.png", "imu": f"{number}.csv"})
    lines.append({"image": "missing.png", "audio": "0.wav"})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [pair for pair in read_pairs(path) if isinstance(pair, Pair)]


def test_encoders_stand_side_by_side_and_one_that_lacks_a_modality_says_so_once(
    things: list[Pair], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, deaf = Bytes("whole", ("image", "audio", "imu")), Bytes("deaf", ("image", "audio"), True)
    blind = Bytes("blind", ("audio", "imu"))
    options = EncodingOptions(media=MediaOptions(), workers=0)
    found, errors = compare_encoders(things, [whole, deaf, blind], MediaRoot(tmp_path), options)
    told = [(r["encoder"], r["licence"], r["first"], r["second"], r["pairs"]) for r in found]
    assert told == [
        ("whole@0123456789ab", None, "image", "audio", 6),
        ("deaf@0123456789ab", "MIT", "image", "audio", 6),
        ("whole@0123456789ab", None, "image", "imu", 6),
    ]
    assert [r["outlook"] for r in found] == ["good", "poor", "good"]
    assert len(errors) == 1 and "missing.png" in errors[0]
    assert (whole.decoded, deaf.decoded, blind.decoded) == (18, 12, 0)
    assert capsys.readouterr().err.splitlines() == [
        "chatbind: deaf has no tower for imu: 6 of 13 pairs are left out",
        "chatbind: blind has no tower for image: 13 of 13 pairs are left out",
    ]
    plot_retrieval(found, tmp_path / "pairs.png")
    assert (tmp_path / "pairs.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ChatBindError, match="no encoder knows both"):
        compare_encoders(things, [blind], MediaRoot(tmp_path), options)


def test_a_gpu_gets_batches(
    things: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, batches = Bytes("one", ("image", "audio", "imu")), []
    encoder.device, encoder.batch_size = torch.device("cuda"), 2

    def embed(media: Sequence[Decoded], *, normalize: bool) -> torch.Tensor:
        batches.append(len(media))
        return torch.stack([medium.tensor for medium in media]) - 128

    monkeypatch.setattr(encoder, "embed", embed)
    options = EncodingOptions(media=MediaOptions(), workers=0)
    compare_encoders(things, [encoder], MediaRoot(tmp_path), options)
    assert set(batches[:-1]) == {4}


def test_a_person_reads_a_table_for_each_pair_with_a_line_for_each_encoder(
    things: list[Pair], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoders = [Bytes("one", ("image", "audio", "imu")), Bytes("another", ("image", "audio"), True)]
    options = EncodingOptions(media=MediaOptions(), workers=0)
    found, _ = compare_encoders(things, encoders, MediaRoot(tmp_path), options)
    importlib.import_module("chatbind_cli.commands.inspect")._show_pairs(found)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        *("image and audio", "one@0123456789ab", "another@0123456789ab"),
        *("image and imu", "one@0123456789ab"),
    ]
    assert len({line.rindex("  ") for line in lines}) == 1  # the last column begins at one place
    assert lines[1].split()[2:5] == ["100.0%", "100.0%", "16.7%"]

"""Several encoders as one: who gets what, and that everybody does what it does alone."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from chatbind_cli.encoders.encoder import Decoded, Encoder, load_media
from chatbind_cli.encoders.opening import open_encoder, open_encoders
from chatbind_cli.encoders.several import SeveralEncoders
from chatbind_cli.encoders.zero_shot import LabelScorer
from chatbind_cli.errors import UsageError, WeightsError
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import MediaSource
from tests.encoders.languagebind.repositories import save_repository
from tests.inference.world import save_media, save_tiny_encoder
from tests.program import chatbind

WIDTHS = (12, 8)
LABELS = ["dog", "cat", "car"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Media, LanguageBind for pictures and sounds, and an ImageBind that knows motion, too."""
    folder = tmp_path_factory.mktemp("several")
    save_media(folder)
    np.save(folder / "moves.npy", np.random.default_rng(0).normal(size=(6, 2000)))
    for modality in ("image", "audio"):
        save_repository(folder / "lb" / modality, modality, dim=WIDTHS[0])
    save_tiny_encoder(folder / "ib", seed=0, texts=True)
    return folder


@pytest.fixture
def opened(folder: Path) -> SeveralEncoders:
    encoder = open_encoders([folder / "lb", folder / "ib"])
    assert isinstance(encoder, SeveralEncoders)
    return encoder


MEDIA = [("0.png", "image"), ("moves.npy", "imu"), ("tone.wav", "audio"), ("depth.png", "depth")]
FIRST = [0, 1, 0, 1]


def embed(encoder: Encoder, media: Sequence[tuple[str, str]], folder: Path) -> torch.Tensor:
    items = [load_media(encoder.read, folder / name, kind) for name, kind in media]
    return encoder.embed(items, normalize=False)


def test_each_medium_is_as_the_first_that_knows_it_makes_it_among_zeros(
    folder: Path, opened: SeveralEncoders
) -> None:
    rows = embed(opened, MEDIA, folder).split(WIDTHS, dim=-1)
    alone = [open_encoder(folder / name) for name in ("lb", "ib")]
    for index, (medium, number) in enumerate(zip(MEDIA, FIRST, strict=True)):
        assert torch.equal(rows[number][index], embed(alone[number], [medium], folder)[0])
        assert not rows[1 - number][index].any()


def test_only_towers_that_are_needed_are_read(folder: Path, opened: SeveralEncoders) -> None:
    embed(opened, MEDIA[:2], folder)
    seeing, moving = opened.parts
    assert set(seeing.loaded) == {"image"}
    assert set(moving.loaded) == {"imu"}


def test_batches_and_attention_are_those_of_the_encoders(
    folder: Path, opened: SeveralEncoders
) -> None:
    film = Decoded(MediaSource("film"), "video", torch.zeros(5, 3, 2, 8, 8))
    assert opened.clips(film) == opened.parts[1].clips(film) == 5
    plain = open_encoders([folder / "lb", folder / "ib"], attn_implementation="eager")
    assert plain.attn_implementation == "eager"


def test_it_is_known_by_all_of_them_in_order(folder: Path, opened: SeveralEncoders) -> None:
    turned = open_encoders([folder / "ib", folder / "lb"])
    assert opened.embedding_dim == turned.embedding_dim == sum(WIDTHS)
    assert len({one.sha256 for one in (opened, turned, *opened.parts)}) == 4
    assert opened.modalities[:3] == ("image", "audio", "text")
    assert {"video", "depth", "thermal", "imu"} <= set(opened.modalities)
    assert opened.reference == f"{folder / 'lb'} + {folder / 'ib'}"
    assert opened.licence == "MIT and unknown"  # as LanguageBind's are, and random ones
    said = MediaOptions(clip_sampler="chatbind", imu_rate_hz=50.0)
    assert "clip_sampler" not in opened.heeds("audio", said)  # LanguageBind's clips are fixed
    assert "clip_sampler" in turned.heeds("audio", said)
    assert "imu_rate_hz" in opened.heeds("imu", said)


def test_one_is_itself_and_more_than_a_handful_are_refused(folder: Path) -> None:
    assert not isinstance(open_encoders([folder / "ib"]), SeveralEncoders)
    with pytest.raises(UsageError, match="9 encoders are more than 8"):
        open_encoders([folder / "ib"] * 9)
    with pytest.raises(UsageError, match="ib is named twice"):
        open_encoders([folder / "ib", folder / "lb", folder / "lb" / ".." / "ib"])


def test_what_none_knows_names_what_they_know(folder: Path) -> None:
    seeing = open_encoders([folder / "lb" / "image", folder / "lb" / "audio"])
    with pytest.raises(WeightsError, match="no tower for imu, only for image, text, audio$"):
        seeing.tower("imu")


@pytest.mark.filterwarnings("ignore")  # whatever open_clip's many imports warn about
def test_labels_are_as_likely_as_for_the_encoder_alone(
    folder: Path, opened: SeveralEncoders
) -> None:
    pytest.importorskip("open_clip")
    together = LabelScorer(opened, LABELS, "a {label}")
    assert "text" not in opened.parts[1].loaded
    for (medium, number), row in zip(
        zip(MEDIA, FIRST, strict=True), embed(opened, MEDIA, folder), strict=True
    ):
        alone = open_encoder(folder / ("lb", "ib")[number])
        own = embed(alone, [medium], folder)[0]
        wanted = LabelScorer(alone, LABELS, "a {label}").score(own, 3, medium[1])
        assert together.score(row, 3, medium[1]) == wanted
        assert wanted[0]["probability"] != wanted[1]["probability"]


@pytest.mark.filterwarnings("ignore")
def test_labels_need_a_text_tower_of_every_encoder_that_gets_media(
    folder: Path, tmp_path: Path, opened: SeveralEncoders
) -> None:
    pytest.importorskip("open_clip")
    save_tiny_encoder(tmp_path / "mute", seed=1)
    mute = open_encoder(tmp_path / "mute")
    with pytest.raises(WeightsError, match=r"mute: has no tower for text"):
        LabelScorer(SeveralEncoders([*opened.parts[:1], mute]), LABELS, "a {label}")
    never = LabelScorer(SeveralEncoders([opened.parts[1], mute]), LABELS, "a {label}")
    assert never.labels == LABELS  # it gets nothing, and need not know texts


def test_what_reads_goes_to_other_processes_without_weights(
    folder: Path, opened: SeveralEncoders
) -> None:
    sent = pickle.dumps(opened.read)
    assert len(sent) < 10_000
    read = pickle.loads(sent)
    for name, kind in MEDIA:
        here, there = (load_media(r, folder / name, kind).tensor for r in (opened.read, read))
        assert torch.equal(here, there)


def test_encode_writes_what_each_makes(folder: Path, opened: SeveralEncoders) -> None:
    listed = "".join(json.dumps({kind: name}) + "\n" for name, kind in MEDIA)
    words = ["encode", "--encoder", "lb", "--encoder", "ib", "--no-normalize", "--device", "cpu"]
    done = chatbind(*words, cwd=folder, stdin=listed)
    assert done.returncode == 0
    found = [json.loads(line) for line in done.stdout.splitlines()]
    rows = torch.tensor([record["embedding"] for record in found])
    assert torch.equal(rows, embed(opened, MEDIA, folder))
    assert {record["encoder"] for record in found} == {f"lb+ib@{opened.sha256[:12]}"}

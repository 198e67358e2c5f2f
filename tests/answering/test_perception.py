"""Media to embeddings: once each, side by side, errors in their place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chatbind_cli.answering.perception import Percept, Perception, StoredPerception
from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.errors import MediaError
from chatbind_cli.imagebind.encoder import load_encoder
from chatbind_cli.imagebind.preprocess import Media, load_media
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.options import MediaOptions
from tests.answering.world import DIM, World


def perception(world: World, **options: Any) -> Perception:
    return Perception(lambda: load_encoder(world.encoder), options=MediaOptions(), **options)


def test_every_medium_gets_its_own_embedding(world: World) -> None:
    files = [world.media / name for name in ("tone.wav", "3.png", "depth.png")]
    seen = perception(world, workers=3).look([Medium(None, file) for file in files])
    wanted = load_encoder(world.encoder).embed([load_media(f) for f in files], normalize=False)
    percepts = [item for item in seen if isinstance(item, Percept)]
    assert [percept.modality for percept in percepts] == ["audio", "image", "depth"]
    assert torch.equal(torch.stack([percept.embedding for percept in percepts]), wanted)
    # the published scale is still on
    assert percepts[0].embedding.norm() > 10


def test_a_modality_that_is_said_wins_over_what_the_content_looks_like(world: World) -> None:
    [item] = perception(world).look([Medium("thermal", world.media / "depth.png")])
    assert isinstance(item, Percept)
    assert item.modality == "thermal"


def test_the_same_content_is_decoded_and_embedded_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    eyes = perception(world)
    eyes.look([Medium(None, world.media / "3.png")])

    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(eyes.encoder, "embed", fail)
    again = eyes.look([Medium(None, (world.media / "3.png").read_bytes())])
    assert isinstance(again[0], Percept)


def test_an_error_takes_the_place_of_its_medium(world: World, tmp_path: Path) -> None:
    seen = perception(world).look(
        [Medium(None, tmp_path / "none.png"), Medium(None, world.media / "1.png")]
    )
    assert isinstance(seen[0], MediaError)
    assert "none.png: no such file" in str(seen[0])
    assert isinstance(seen[1], Percept)


def test_what_means_nothing_to_the_encoder_is_an_error_of_its_medium(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(source: Any, found: str, options: MediaOptions) -> Media:
        media = load_media(source, found, options)
        if source.name.endswith("tone.wav"):
            return replace(media, tensor=media.tensor * float("nan"))
        if source.name.endswith("depth.png"):
            raise KeyError("mode")
        return media

    monkeypatch.setattr("chatbind_cli.answering.perception.load_media", load)
    files = [world.media / name for name in ("tone.wav", "3.png", "depth.png")]
    broken, fine, odd = perception(world).look([Medium(None, file) for file in files])
    assert "not finite" in str(broken)
    assert isinstance(fine, Percept)
    assert str(odd) == f"{files[2]}: cannot be used (KeyError: 'mode')"


def test_a_sense_that_the_encoder_lacks_is_named(world: World) -> None:
    eyes = perception(world)
    eyes.encoder.towers = ("vision",)
    [item] = eyes.look([Medium(None, world.media / "tone.wav")])
    assert "the encoder has no tower for audio" in str(item)


def test_a_store_is_asked_by_name(tmp_path: Path) -> None:
    vector = torch.arange(DIM, dtype=torch.float32)
    with EmbeddingStore.open(tmp_path, "a", encoder_sha256="0" * 64, dim=DIM) as store:
        store.add("a/x.png", "image", "1" * 64, "image/v1", vector)
    eyes = StoredPerception([EmbeddingStore.open(tmp_path, "r")], MediaOptions())
    found, missing = eyes.look([Medium("image", "a/x.png"), Medium("image", "y.png")])
    assert isinstance(found, Percept)
    assert torch.equal(found.embedding, vector)
    assert "y.png: is not in the store" in str(missing)

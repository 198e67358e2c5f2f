"""Media to embeddings: once each, side by side, errors in their place."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.encoders.encoder import Decoded, Read
from chatbind_cli.encoders.imagebind.preprocess import load_media
from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.errors import ChatBindError, MediaError
from chatbind_cli.inference.loaded_model import LoadedModel, load_model
from chatbind_cli.inference.media_encoder import MediaEncoder, StoredEmbeddings
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.source import MediaSource, open_source
from tests.inference.world import DIM, World


@pytest.fixture(scope="module")
def loaded(world: World) -> LoadedModel:
    return load_model(world.model, device="cpu")


def embeddings(found: Sequence[Medium | ChatBindError]) -> torch.Tensor:
    rows = [item.embedding for item in found if isinstance(item, Medium)]
    return torch.stack([row for row in rows if row is not None])


def test_every_medium_gets_its_own_embedding(loaded: LoadedModel, world: World) -> None:
    files = [world.media / name for name in ("tone.wav", "3.png", "depth.png")]
    found = MediaEncoder(loaded).embed([Medium(None, file) for file in files])
    wanted = open_encoder(world.encoder).embed([load_media(f) for f in files], normalize=False)
    assert [getattr(item, "modality", item) for item in found] == ["audio", "image", "depth"]
    assert torch.equal(embeddings(found), wanted)
    # the published scale is still on
    assert embeddings(found)[0].norm() > 10


def test_a_modality_that_is_said_wins_over_what_the_content_looks_like(
    loaded: LoadedModel, world: World
) -> None:
    [item] = MediaEncoder(loaded).embed([Medium("thermal", world.media / "depth.png")])
    assert isinstance(item, Medium)
    assert item.modality == "thermal"


def test_the_same_content_is_decoded_and_embedded_once(
    loaded: LoadedModel, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = MediaEncoder(loaded)
    encoder.embed([Medium(None, world.media / "3.png")])

    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(encoder.encoder, "embed", fail)
    again = encoder.embed([Medium(None, (world.media / "3.png").read_bytes())])
    assert embeddings(again).any()


def test_an_error_takes_the_place_of_its_medium(
    loaded: LoadedModel, world: World, tmp_path: Path
) -> None:
    seen = MediaEncoder(loaded).embed(
        [Medium(None, tmp_path / "none.png"), Medium(None, world.media / "1.png")]
    )
    assert isinstance(seen[0], MediaError)
    assert "none.png: no such file" in str(seen[0])
    assert isinstance(seen[1], Medium)


def test_what_means_nothing_to_the_encoder_is_an_error_of_its_medium(
    loaded: LoadedModel, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(read: Read, source: Any, found: str, options: MediaOptions) -> Decoded:
        media = load_media(source, found, options)
        if source.name.endswith("tone.wav"):
            return replace(media, tensor=media.tensor * float("nan"))
        if source.name.endswith("depth.png"):
            raise KeyError("mode")
        return media

    monkeypatch.setattr("chatbind_cli.data.decoders.load_media", load)
    files = [world.media / name for name in ("tone.wav", "3.png", "depth.png")]
    broken, fine, odd = MediaEncoder(loaded).embed([Medium(None, file) for file in files])
    assert "not finite" in str(broken)
    assert isinstance(fine, Medium)
    assert str(odd) == f"{files[2]}: cannot be used (KeyError: 'mode')"


def test_a_modality_that_the_encoder_lacks_is_named(loaded: LoadedModel, world: World) -> None:
    encoder = MediaEncoder(loaded)
    encoder.encoder.towers = ("vision",)
    [item] = encoder.embed([Medium(None, world.media / "tone.wav")])
    assert "the encoder has no tower for audio" in str(item)


def test_so_many_media_are_decoded_at_a_time_and_any_number_may_be_on_their_way(
    loaded: LoadedModel, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_here, decoding, most = threading.Barrier(6, timeout=10), threading.Semaphore(2), [2]

    def open_slowly(ref: Any) -> MediaSource:
        all_here.wait()
        return open_source(ref)

    def load(*words: Any) -> Decoded:
        assert decoding.acquire(blocking=False)
        time.sleep(0.02)
        most.append(decoding._value)
        decoding.release()
        return load_media(*words[1:])

    monkeypatch.setattr("chatbind_cli.data.decoders.load_media", load)
    encoder = MediaEncoder(loaded, open_media=open_slowly, workers=2)
    media = [[Medium(None, world.media / f"{n}.png")] for n in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert all(isinstance(one, Decoded) for [one] in pool.map(encoder.read, media))
    assert min(most) == 0


def test_what_does_not_fit_in_memory_together_goes_in_parts(
    loaded: LoadedModel, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = MediaEncoder(loaded)
    media = [Medium(None, world.media / f"{n}.png") for n in range(5)]
    wanted = embeddings(encoder.embed(media))
    embed = encoder.encoder.embed

    def tight(some: Sequence[Decoded], *, normalize: bool) -> torch.Tensor:
        if len(some) > 2 or any(one.source.name.endswith("4.png") for one in some):
            raise torch.OutOfMemoryError
        return embed(some, normalize=normalize)

    monkeypatch.setattr(encoder.encoder, "embed", tight)
    encoder._remembered.clear()
    found = encoder.embed(media)
    assert "no memory" in str(found[4])
    assert torch.equal(embeddings(found), wanted[:4])


def test_texts_are_embedded_beside_media(loaded: LoadedModel, world: World, golden: Path) -> None:
    encoder = MediaEncoder(loaded)
    [none] = encoder.embed([Medium("text", "A dog.")])
    assert "no tower for text" in str(none)
    encoder.encoder = open_encoder(golden / "imagebind_small" / "imagebind_small.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever open_clip's many imports warn about
        files = [Medium("text", "A dog."), Medium(None, world.media / "1.png")]
        found = encoder.embed([*files, Medium("text", "a\ud800"), Medium("text", "A car")])
    assert [getattr(item, "modality", None) for item in found] == ["text", "image", None, "text"]
    assert "<text>" in str(found[2])
    reference = load_file(golden / "imagebind_small" / "outputs.safetensors")["text"][:2]
    rows = embeddings([found[0], found[3]])
    torch.testing.assert_close(rows, reference, rtol=0, atol=47e-5)  # 1e-5 of the magnitude


def test_a_store_is_asked_by_name(loaded: LoadedModel, tmp_path: Path) -> None:
    vector = torch.arange(DIM, dtype=torch.float32)
    sha256 = loaded.encoder_sha256
    with EmbeddingStore.open(tmp_path, "a", encoder_sha256=sha256, dim=DIM) as store:
        store.add("a/x.png", "image", "1" * 64, "image/v1", vector)
    encoder = StoredEmbeddings([tmp_path], loaded, MediaOptions())
    found, missing = encoder.encode([Medium("image", "a/x.png"), Medium("image", "y.png")], [])
    assert torch.equal(embeddings([found]), vector.unsqueeze(0))
    assert "y.png: is not in the store" in str(missing)

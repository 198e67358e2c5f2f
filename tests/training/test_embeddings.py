"""Every distinct medium is encoded once, by one process of several."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from chatbind_cli.data.lookup import Embeddings, open_parts, open_stores
from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.encoders.encoder import Decoded, Encoder
from chatbind_cli.encoders.imagebind.preprocess import load_media
from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.errors import StoreError
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.root import MediaRoot
from chatbind_cli.training.embeddings import encode_media
from tests.training.conftest import Counting

OPTIONS = MediaOptions()


@pytest.fixture
def encoder(world) -> Counting:  # type: ignore[no-untyped-def]
    made = open_encoder(world.imagebind)
    made.__class__ = Counting
    return made


def test_two_processes_share_the_work(world, encoder, tmp_path) -> None:
    media = [Medium("image", f"p{n}.png") for n in range(8)]
    for rank in range(2):
        part = tmp_path / f"part-0000{rank}"
        assert not encode_media(media[rank::2], encoder, MediaRoot(world.media), part, OPTIONS)
    assert encoder.n_encoded == 8
    (tmp_path / "part-00002").mkdir()  # what a process that was killed at once has left
    rows = Embeddings(open_parts(tmp_path)).rows(media)
    loaded = [load_media(world.media / m.ref) for m in media]
    expected = encoder.embed(loaded, normalize=False)
    # the store keeps float16: 11 bits
    torch.testing.assert_close(rows, expected, rtol=2**-10, atol=1e-5)


def test_a_copy_of_a_file_is_not_encoded_again(world, encoder, tmp_path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    shutil.copy(world.media / "p0.png", folder / "a.png")
    part = tmp_path / "part-00000"
    encode_media([Medium("image", "a.png")], encoder, MediaRoot(folder), part, OPTIONS)
    shutil.copy(folder / "a.png", folder / "b.png")
    both = [Medium("image", "a.png"), Medium("image", "b.png")]
    encode_media(both, encoder, MediaRoot(folder), part, OPTIONS)
    assert encoder.n_encoded == 1
    rows = Embeddings(open_parts(tmp_path)).rows(both)
    assert torch.equal(rows[0], rows[1])


def test_what_cannot_be_read_is_told_and_the_rest_is_encoded(world, encoder, tmp_path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    shutil.copy(world.media / "p0.png", folder / "good.png")
    (folder / "broken.png").write_bytes((world.media / "p1.png").read_bytes()[:40])
    media = [Medium("image", name) for name in ("broken.png", "good.png", "gone.png")]
    part = tmp_path / "part-00000"
    failed = dict(encode_media(media, encoder, MediaRoot(folder), part, OPTIONS))
    assert set(failed) == {media[0], media[2]}
    assert "broken.png" in failed[media[0]]
    assert media[1] in Embeddings(open_parts(tmp_path))


def test_what_the_encoder_makes_nothing_of_is_left_out(world, encoder, tmp_path) -> None:
    whole = encoder.embed

    def embed(media: Sequence[Decoded], *, normalize: bool) -> torch.Tensor:
        rows = whole(media, normalize=normalize)
        rows[[item.source.ref.endswith("p1.png") for item in media]] = float("inf")
        return rows

    encoder.embed = embed
    media = [Medium("image", name) for name in ("p0.png", "p1.png", "p2.png")]
    part = tmp_path / "part-00000"
    failed = dict(encode_media(media, encoder, MediaRoot(world.media), part, OPTIONS))
    assert set(failed) == {media[1]}
    assert "not finite" in failed[media[1]]


def test_stores_of_different_encoders_are_not_mixed(tmp_path: Path) -> None:
    for part, digest in (("part-00000", "aa" * 32), ("part-00001", "bb" * 32)):
        EmbeddingStore.open(tmp_path / part, "a", encoder_sha256=digest, dim=4).close()
    with pytest.raises(StoreError, match="holds embeddings of different encoders"):
        open_stores(tmp_path)


def test_an_embedding_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"image gone\.png"):
        Embeddings(open_parts(tmp_path)).rows([Medium("image", "gone.png")])
    assert Embeddings(open_parts(tmp_path)).rows([]) is None


def test_the_next_stage_encodes_nothing(world, here, tmp_path, monkeypatch) -> None:
    for picture in world.media.iterdir():
        os.utime(picture, (0, 0))  # a fresh file would be read again
    more = ("--max-steps", "1", "--learning-rate", "0")
    assert here("pretrain", *world.args(tmp_path / "a", *more, source="media")).code == 0
    monkeypatch.setattr(Encoder, "embed", None)
    words = world.args(tmp_path / "b", *more, "--freeze-backbone", source="media")
    done = here("finetune", *words)
    assert done.code == 0, done.stderr
    assert "8 embeddings were there already" in done.stderr
    assert len(open_parts(tmp_path / "b" / "embeddings")[0]) == 8
    without = here("finetune", *words, "-o", str(tmp_path / "c"), "--embedding-cache", "none")
    assert without.code != 0


def test_a_run_goes_on_with_another_cache_or_none(world, here, tmp_path) -> None:
    words = world.args(tmp_path / "a", "--max-steps", "1", source="media")
    assert here("pretrain", *words, "--embedding-cache", str(tmp_path / "mine")).code == 0
    [folder] = (tmp_path / "mine").iterdir()
    assert len(EmbeddingStore.open(folder)) == 8
    done = here("pretrain", *words, "--embedding-cache", "none")
    assert done.code == 0 and "this run is finished" in done.stderr

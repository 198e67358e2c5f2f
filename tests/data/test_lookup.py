"""Embeddings by name: which rows count, and what stores say about their making."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chatbind_cli.data.conversations import Conversations, Media
from chatbind_cli.data.lookup import Embeddings, WideEmbeddings, open_stores, options_in
from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.errors import StoreError
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.options import MediaOptions

OURS = MediaOptions()
OTHER = MediaOptions(clip_sampler="chatbind", video_clips=2)


def fill(folder: Path, *rows: tuple[str, MediaOptions], **values: Any) -> Path:
    """Adds a row a (name, options); its embedding is its number, counted from 1."""
    known: dict[str, Any] = {"encoder_sha256": "ab" * 32, "dim": 2, **values}
    with EmbeddingStore.open(folder, "a", **known) as store:
        for number, (name, options) in enumerate(rows, 1):
            row = torch.full((2,), float(number))
            modality = "image" if name.endswith("png") else "video"
            store.add(name, modality, f"{number:064x}", options.fingerprint(modality), row)
    return folder


def agreed(folder: Path, *used: str, **trained: Any) -> MediaOptions:
    return options_in(open_stores(folder), used, trained)


def test_a_store_says_what_made_it_even_where_its_rows_do_not(tmp_path: Path) -> None:
    fill(tmp_path, ("a.png", OTHER), media_options=OTHER.deciding(), encoder_dtype="bfloat16")
    assert agreed(tmp_path, "image") == OTHER
    assert EmbeddingStore.open(tmp_path).meta.encoder_dtype == "bfloat16"
    with pytest.raises(StoreError, match="encoder dtype bfloat16, not float32"):
        fill(tmp_path, media_options=OTHER.deciding(), encoder_dtype="float32")


def test_a_store_that_differs_from_training_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "old", ("a.mp4", OTHER))
    with pytest.raises(StoreError, match="made otherwise than video/v1/5.*: 'video/v1/2/2.0/chatb"):
        agreed(tmp_path / "old", "video")
    assert agreed(tmp_path / "old", "video", **OTHER.deciding()) == OTHER
    assert agreed(tmp_path / "old", "image") == OURS  # nothing speaks against it
    fill(tmp_path / "new", ("a.png", OTHER), media_options=OTHER.deciding())
    with pytest.raises(StoreError, match="has video_clips 2, .* has 5"):
        agreed(tmp_path / "new", "image", **OURS.deciding())


def test_rows_of_several_makings_are_refused_unless_training_says_which(tmp_path: Path) -> None:
    fill(tmp_path, ("a.mp4", OURS), ("a.mp4", OTHER), ("a.png", OURS))
    with pytest.raises(StoreError, match="video embeddings that were made otherwise"):
        agreed(tmp_path, "video")
    assert agreed(tmp_path, "image") == OURS
    options = agreed(tmp_path, "video", **OURS.deciding())
    assert options == OURS
    medium = Medium("video", "a.mp4")
    stores = open_stores(tmp_path)
    for chosen, number in ((OURS, 1.0), (OTHER, 2.0), (None, 2.0)):
        [row] = Embeddings(stores, chosen).rows([medium])
        assert row.tolist() == [number, number]
    assert medium not in Embeddings(stores, MediaOptions(video_clips=9))


def test_many_media_are_found_at_once_in_their_order(tmp_path: Path) -> None:
    fill(tmp_path / "1", ("a.png", OURS), ("é\udce9.png", OURS))
    fill(tmp_path / "2", ("x.mp4", OURS), ("a.png", OURS), ("a.mp4", OURS), ("a.mp4", OTHER))
    stores = [EmbeddingStore.open(tmp_path / name) for name in ("1", "2")]
    names = ["x.mp4", "a.png", "é\udce9.png", "a.mp4", "a.png", "x.mp4"]
    media = [Medium("image" if name.endswith("png") else "video", name) for name in names]
    for chosen, numbers in ((OURS, [1, 1, 2, 3, 1, 1]), (None, [1, 1, 2, 4, 1, 1])):
        found = Embeddings(stores, chosen)
        rows = found.rows(media)
        assert rows is not None
        assert rows.dtype == torch.float32
        assert rows.tolist() == [[float(number)] * 2 for number in numbers]
        assert all(torch.equal(row, found.find(m)) for m, row in zip(media, rows, strict=True))
    for gone in (Medium("image", "x.mp4"), Medium(None, "a.png"), Medium("video", "none.mp4")):
        with pytest.raises(StoreError, match=f"has no embedding of the {gone.modality} "):
            Embeddings(stores, OURS).rows([media[0], gone])


def test_of_several_encoders_the_view_says_whose_embedding_counts(tmp_path: Path) -> None:
    fill(tmp_path / "1", ("a.png", OURS), ("b.png", OURS))
    fill(tmp_path / "2", ("b.png", OURS), ("a.png", OURS), ("x.mp4", OURS))
    kinds = ({"image"}, {"image", "video"})
    stores = [[EmbeddingStore.open(tmp_path / name)] for name in ("1", "2")]
    parts = [Embeddings(some, OURS, known) for some, known in zip(stores, kinds, strict=True)]
    found = WideEmbeddings(parts, [2, 2])
    a, b, x = Medium("image", "a.png"), Medium("image", "b.png"), Medium("video", "x.mp4")
    # of films only the second knows anything
    rows = found.rows([a, x, b, a], [0, 0, 1, 1])
    assert rows is not None
    assert rows.tolist() == [[1, 1, 0, 0], [0, 0, 3, 3], [0, 0, 1, 1], [0, 0, 2, 2]]
    assert found.rows([], []) is None
    for gone in (Medium("audio", "a.wav"), Medium("image", "c.png")):
        with pytest.raises(StoreError, match=f"has no embedding of the {gone.modality} "):
            found.rows([a, gone], [0, 0])
    asked = {"image": ["a.png", "c.png"], "video": "x.mp4", "audio": "a.wav"}
    words = "".join(f"<{kind}>" for kind in ("image", "image", "video", "audio"))
    talk = [{"from": "human", "value": words}, {"from": "gpt", "value": "No."}]
    media = Media(Conversations([({**asked, "conversations": talk}, "")]))
    assert found.missing(media) == [Medium("image", "c.png")]


def test_later_rows_leave_in_the_store_what_all_have_in_common(tmp_path: Path) -> None:
    fill(tmp_path, ("a.png", OTHER), media_options=OTHER.deciding())
    fill(tmp_path, ("b.png", OURS), media_options=OURS.deciding())
    said = EmbeddingStore.open(tmp_path).meta.media_options
    assert said is not None
    assert "clip_sampler" not in said
    assert said["audio_clips"] == OURS.audio_clips


def test_a_store_of_nonsense_is_one_error(tmp_path: Path) -> None:
    fill(tmp_path / "type", ("a.png", OURS), media_options={"video_clips": "x"})
    with pytest.raises(StoreError, match="wrong type"):
        agreed(tmp_path / "type", "image")
    fill(tmp_path / "kind")
    with EmbeddingStore.open(tmp_path / "kind", "a") as store:
        store.add("a.mp4", "video", "1" * 64, "video/v1/²/2.0/imagebind", torch.zeros(2))
    with pytest.raises(StoreError, match="otherwise than .*: 'video/v1/²/2.0/imagebind"):
        agreed(tmp_path / "kind", "video")


def test_many_media_are_looked_up_as_one_is(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("chatbind_cli.data.lookup._ASKED_AT_ONCE", 3)
    fill(tmp_path / "part-0", ("a.png", OURS), ("b.png", OURS), ("c.mp4", OTHER), ("é 1.png", OURS))
    fill(tmp_path / "part-1", ("d.png", OURS), ("b.png", OURS), ("c.mp4", OURS), ("e.mp4", OTHER))
    names = ["a.png", "b.png", "c.mp4", "d.png", "e.mp4", "f.png", "é 1.png", "%"]
    asked = "".join(f"<{m}>" for m in ("image", "video") for _ in names)
    talk = [{"from": "human", "value": asked}, {"from": "gpt", "value": "No."}]
    media = Media(Conversations([({"image": names, "video": names, "conversations": talk}, "")]))
    for options in (None, OURS, OTHER):
        found = Embeddings(open_stores(tmp_path), options)
        missing = found.missing(media)
        assert missing == [medium for medium in media if medium not in found]
        assert 0 < len(missing) < len(media)
    assert Embeddings([]).missing(media) == list(media)


def test_a_run_of_several_encoders_has_stores_that_are_named_one_by_one(tmp_path: Path) -> None:
    for number in (1, 2):
        fill(tmp_path / f"encoder-{number}" / "part-00000", ("a", MediaOptions()))
    with pytest.raises(StoreError, match=r"several encoders.*--store .*encoder-1 --store .*-2"):
        open_stores(tmp_path)
    assert open_stores(tmp_path / "encoder-2")

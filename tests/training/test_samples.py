"""Batches: padding, masks, labels, and the order of media."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from chatbind_cli.data.conversations import Conversations
from chatbind_cli.data.lookup import Embeddings, WideEmbeddings
from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.data.tokens import TokenizedSample
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.model.label_loss import IGNORE_INDEX
from chatbind_cli.training.samples import Collator, TrainingSamples


def test_a_batch_is_padded_on_the_right() -> None:
    batch = Collator(0)(
        [
            {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
            {"input_ids": [8], "labels": [8], "media_embeddings": None},
        ]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, IGNORE_INDEX, IGNORE_INDEX]]
    assert "media_embeddings" not in batch


def test_media_follow_the_rows() -> None:
    one, two = torch.arange(8.0).view(2, 4), torch.ones(1, 4)
    sample = {"input_ids": [1], "labels": [1]}
    batch = Collator(0)(
        [
            {**sample, "media_embeddings": one},
            {**sample, "media_embeddings": None},
            {**sample, "media_embeddings": two},
        ]
    )
    assert torch.equal(batch["media_embeddings"], torch.cat([one, two]))


def test_each_sample_gets_the_embeddings_of_its_own_media(tmp_path: Path) -> None:
    made = MediaOptions().fingerprint("image")
    with EmbeddingStore.open(tmp_path, "a", encoder_sha256="ab" * 32, dim=2) as store:
        for number in range(4):
            row = torch.full((2,), float(number))
            store.add(f"{number}.png", "image", f"{number:064x}", made, row)
    stored = Embeddings([EmbeddingStore.open(tmp_path)], MediaOptions())
    found = WideEmbeddings([stored], [2])
    asked: Any = None  # not for tokens
    text = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    ten = Conversations([({"conversations": text}, f":{n}") for n in range(10)])
    media = ([3], [], [1, 0], [3])
    tokens = [
        TokenizedSample([n], [n], tuple(Medium("image", f"{name}.png") for name in names))
        for n, names in enumerate(media)
    ]
    samples = TrainingSamples(ten, asked, found, 8).with_media([7, 5, 9, 6], tokens)
    assert [s["number"] for s in samples] == [7, 5, 9, 6]
    assert [s["labels"] for s in samples] == [[0], [1], [2], [3]]
    for sample, names in zip(samples, media, strict=True):
        wanted = torch.tensor([[float(name)] * 2 for name in names])
        rows = sample["media_embeddings"]
        assert rows is None if not names else torch.equal(rows, wanted)


def test_lengths_can_be_rounded_up() -> None:
    batch = Collator(0, pad_to_multiple_of=8)([{"input_ids": [1] * 9, "labels": [1] * 9}])
    assert batch["input_ids"].shape == (1, 16)


def test_a_padding_token_that_is_also_a_word_stays_visible() -> None:
    batch = Collator(2)(
        [{"input_ids": [2, 5], "labels": [2, 5]}, {"input_ids": [2], "labels": [2]}]
    )
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_it_equals_the_references_batch(golden: Path) -> None:
    text = (golden / "prompts" / "training_golden.json").read_text("utf-8")
    for settings in json.loads(text)["variants"].values():
        if "collated_first_six" not in settings:
            continue
        batch = Collator(settings["special_ids"]["pad"])(settings["samples"][:6])
        wanted = settings["collated_first_six"]
        assert batch["input_ids"].tolist() == wanted["input_ids"]
        assert batch["labels"].tolist() == wanted["labels"]
        # the reference's mask also hides words whose id is the padding's; there is none here
        assert batch["attention_mask"].long().tolist() == [
            [int(x) for x in row] for row in wanted["attention_mask"]
        ]

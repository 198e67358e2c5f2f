"""Several encoders side by side: every picture is seen with each, and each projector learns."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from chatbind_cli.checkpoints.projector_file import read_projector, write_projector
from chatbind_cli.data.conversations import Conversations
from chatbind_cli.data.lookup import Embeddings, WideEmbeddings, open_stores
from chatbind_cli.data.tokens import PromptEncoder
from chatbind_cli.encoders.imagebind.config import ImageBindConfig
from chatbind_cli.encoders.imagebind.model import ImageBind
from chatbind_cli.encoders.imagebind.weights import save_encoder
from chatbind_cli.jsonl import read_records
from chatbind_cli.model.loading import load_chatbind
from chatbind_cli.training.samples import Collator, TrainingSamples
from tests.inference.world import SIZES
from tests.training.conftest import DIM, Outcome, World
from tests.training.test_resume import sha256, unfinish

Here = Callable[..., Outcome]

WIDTH = 12
"""Of the second encoder's embeddings."""


def another(folder: Path, modalities: list[str], seed: int = 5) -> Path:
    """An encoder of other weights and widths than the world's."""
    config = ImageBindConfig(**{**SIZES, "out_embed_dim": WIDTH})
    torch.manual_seed(seed)
    save_encoder(ImageBind(config, modalities=modalities), config, folder)
    return folder


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return another(tmp_path_factory.mktemp("second") / "other", ["image", "imu"])


def both(world: World, second: Path, out: Path, *more: str) -> list[str]:
    return world.args(out, "--encoder", str(second), *more, source="media")


def losses(world: World, model: Path, stores: Path) -> list[float]:
    """The model's loss on the pictures of the world, by each encoder alone."""
    bundle = load_chatbind(model)
    bundle.model.eval()
    kept = [open_stores(stores / f"encoder-{number}") for number in (1, 2)]
    everything = Conversations(read_records(world.captions))
    found = []
    for kinds in ([{"image"}, ()], [(), {"image"}]):
        # whatever the view, a picture goes to the one that knows such
        parts = [Embeddings(some, known=known) for some, known in zip(kept, kinds, strict=True)]
        samples = TrainingSamples(
            everything,
            PromptEncoder(bundle.tokenizer, bundle.config),
            WideEmbeddings(parts, [DIM, WIDTH]),
            2048,
        )
        pictures = [number for number, one in enumerate(everything) if one.media]
        batch = Collator(0)(samples.__getitems__(pictures))
        del batch["work"], batch["samples"]
        with torch.no_grad():
            found.append(float(bundle.model(**batch).loss))
    return found


def test_either_encoder_s_projector_learns_of_pictures(world, second, here, tmp_path) -> None:
    # nothing trains but the projector
    how = ("--freeze-backbone", "--mm-use-im-start-end", "no", "--learning-rate", "0.1")
    start, out = tmp_path / "start", tmp_path / "out"
    assert here("finetune", *both(world, second, start, *how, "--max-steps", "0")).code == 0
    done = here("finetune", *both(world, second, out, *how, "--num-train-epochs", "2"))
    assert done.code == 0, done.stderr
    # 13 of 16 conversations have a picture
    assert "with each of 2 encoders that knows its media: an epoch has 29 samples" in done.stderr
    assert done.records[-1]["steps"] == 2 * 15
    config = load_chatbind(out).config
    assert config.embedding_dim == DIM + WIDTH
    assert [part["name"] for part in config.encoder["parts"]] == ["imagebind", "other"]
    stores = out / "embeddings"
    before, after = losses(world, start, stores), losses(world, out, stores)
    for old, new in zip(before, after, strict=True):
        assert new < old


def test_a_run_with_two_encoders_goes_on_bit_for_bit(world, second, here, tmp_path) -> None:
    out = tmp_path / "out"
    words = both(world, second, out, "--learning-rate", "0.01", "--save-steps", "4")
    words += ["--save-total-limit", "2"]
    assert here("pretrain", *words).code == 0
    first = sha256(out)
    unfinish(out)
    shutil.rmtree(out / "checkpoint-15")
    shutil.rmtree(out / "embeddings" / "encoder-2")
    # what a killed run has left goes on with the same encoders in the same order alone
    at = words.index("--encoder")
    turned = [*words[:at], "--encoder", str(second), *words[at:]]
    del turned[turned.index(str(second), at + 2) - 1 : turned.index(str(second), at + 2) + 1]
    for other in (turned, world.args(out, source="media")):
        refused = here("pretrain", *other, "--learning-rate", "0.01", "--save-steps", "4")
        assert refused.code == 1
        assert "holds a run with encoder [" in refused.stderr
    done = here("pretrain", *words)
    assert done.code == 0, done.stderr
    assert "going on from step 12 of 15" in done.stderr
    assert sha256(out) == first
    parts = read_projector(out / "projector.safetensors").tensors
    assert {name.split(".")[2] for name in parts} == {"0", "1"}
    # another order is refused before anything is encoded
    projector = ("--projector", str(out / "projector.safetensors"))
    turned[turned.index(str(out))] = str(tmp_path / "two")
    refused = here("finetune", *turned, *projector)
    assert refused.code == 1
    assert "was trained with the encoders in another order" in refused.stderr
    assert not (tmp_path / "two" / "embeddings").exists()
    # the stores are what a later run may take in place of media and encoders
    stores = [str(out / "embeddings" / f"encoder-{number}") for number in (1, 2)]
    again = world.args(tmp_path / "again", "--learning-rate", "0.01", "--store", stores[1])
    again[again.index("--store") + 1] = stores[0]
    assert here("pretrain", *again).code == 0
    taken = read_projector(tmp_path / "again" / "projector.safetensors").tensors
    assert all(torch.equal(taken[name], tensor) for name, tensor in parts.items())
    projector = str(tmp_path / "again" / "projector.safetensors")
    words = world.args(tmp_path / "nowhere", "--projector", projector, source="media")
    at = words.index("--encoder")
    refused = here("finetune", *words[:at], *words[at + 2 :])
    assert refused.code == 1
    assert "was trained with imagebind and other, and does not say where" in refused.stderr
    unfinish(tmp_path / "again")
    noted = json.loads((tmp_path / "again" / "run.json").read_text())
    noted["found"]["samples"] += 1  # as of stores with other modalities
    (tmp_path / "again" / "run.json").write_text(json.dumps(noted))
    refused = here("pretrain", *again)
    assert refused.code == 1
    assert "samples" in refused.stderr
    refused = here("pretrain", *again, "--encoder", str(second), "--encoder", str(world.imagebind))
    assert re.search(r"was made by imagebind \(\w{12}\), and --encoder names", refused.stderr)


def test_training_goes_on_in_the_numbers_of_each_encoder(world, second, here, tmp_path) -> None:
    out = tmp_path / "out"
    assert here("pretrain", *both(world, second, out, "--max-steps", "1")).code == 0
    made = read_projector(out / "projector.safetensors")
    made.info.encoder["parts"][1]["dtype"] = "bfloat16"
    write_projector(tmp_path / "half.safetensors", made)
    words = both(world, second, tmp_path / "next", "--max-steps", "1")
    done = here("finetune", *words, "--projector", str(tmp_path / "half.safetensors"))
    assert done.code == 0, done.stderr
    stores = [open_stores(tmp_path / "next" / "embeddings" / f"encoder-{n}") for n in (1, 2)]
    assert [store.meta.encoder_dtype for [store] in stores] == ["float32", "bfloat16"]


def test_what_a_projector_was_trained_with_is_taken_where_none_is_named(
    world, second, here, tmp_path
) -> None:
    out, moved = tmp_path / "out", shutil.copytree(second, tmp_path / "moved")
    assert here("pretrain", *both(world, moved, out, "--max-steps", "1")).code == 0
    projector = out / "projector.safetensors"
    words = world.args(tmp_path / "next", "--projector", str(projector), source="media")
    at = words.index("--encoder")
    del words[at : at + 2]
    done = here("finetune", *words, "--max-steps", "1")
    assert done.code == 0, done.stderr
    parts = load_chatbind(tmp_path / "next").config.encoder["parts"]
    assert [part["path"] for part in parts] == [str(world.imagebind), str(moved)]
    # what is gone, and what would have to be fetched, has to be named
    words[words.index(str(tmp_path / "next"))] = str(tmp_path / "later")
    made = read_projector(projector)
    for place, told in (
        (
            str(tmp_path / "gone"),
            f"an encoder that is not at {tmp_path / 'gone'} any more; name all",
        ),
        ("hf:some/one", "hf:some/one: is not on this machine, and is fetched for those alone who"),
    ):
        made.info.encoder["parts"][1]["path"] = place
        write_projector(projector, made)
        refused = here("finetune", *words)
        assert refused.code == 1
        assert told in refused.stderr.splitlines()[-1]


def test_encoders_that_cannot_be_used_together_are_one_line(world, second, here, tmp_path) -> None:
    out = tmp_path / "out"
    copy = shutil.copytree(second, tmp_path / "copy")
    sound = another(tmp_path / "ears", ["audio"])
    for code, more, told in (
        (2, ("--encoder", str(second)), f"--encoder {second} is named twice"),
        (2, ("--encoder", str(copy)), f"{copy} has the weights of {second}; name every encoder"),
        (2, ("--store", str(world.store)), "2 --encoder and 1 --store: "),
    ):
        refused = here("pretrain", *both(world, second, out, *more))
        assert refused.code == code
        assert told in refused.stderr.splitlines()[-1]
        assert not out.exists()
    wide = tmp_path / "wide"
    eyes = ("--encoder", str(world.imagebind), "--encoder", str(second))
    picture = str(next(world.media.glob("*.png")))
    assert here("encode", *eyes, "--store", str(wide), picture).code == 0
    words = world.args(out)
    words[words.index("--store") + 1] = str(wide)
    refused = here("pretrain", *words)
    assert refused.code == 1
    assert "wide: has rows of several encoders side by side (" in refused.stderr
    done = here("pretrain", *both(world, sound, out, "--max-steps", "1"))
    assert done.code == 0, done.stderr
    assert "no conversation has media that ears knows: its projector learns nothing" in done.stderr


def test_what_no_encoder_knows_is_told_before_anything_heavy(world, here, tmp_path) -> None:
    out = tmp_path / "out"
    eyes = another(tmp_path / "eyes", ["audio"])
    words = world.args(out, "--max-steps", "1", source="media")
    words[words.index("--encoder") + 1] = str(eyes)
    refused = here("pretrain", *words)
    assert refused.code == 1
    assert refused.stderr.splitlines()[-1] == (
        "chatbind: error: the data have 8 media of image, which no encoder knows: eyes knows "
        "audio; add an encoder that does (--encoder), or leave them out with --on-error skip"
    )
    assert not out.exists()
    skipped = here("pretrain", *words, "--on-error", "skip")
    assert skipped.code == 0, skipped.stderr
    assert "3 conversations with 0 different media, 8 input(s) left out" in skipped.stderr
    # it knows one modality alone
    assert "what is learned with eyes will not carry over to other modalities" in skipped.stderr
    stores = ["--store", str(out / "embeddings")]
    stored = here("pretrain", *words, *stores, "-o", str(tmp_path / "more"), "--on-error", "skip")
    assert stored.code == 0, stored.stderr
    assert "what is learned with eyes will not carry over to other modalities" in stored.stderr
    left_out = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert left_out[0]["error"].endswith("no encoder knows image: eyes knows audio")

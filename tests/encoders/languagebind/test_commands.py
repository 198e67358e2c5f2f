"""LanguageBind through the commands: nothing but `--encoder` changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from chatbind_cli.encoders.encoder import load_media
from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.files import sha256_text
from tests.encoders.languagebind.repositories import DIM, save_repository
from tests.inference.world import save_language_model, save_media, write_jsonl
from tests.program import chatbind

Run = Callable[..., tuple[int, list[dict[str, Any]], str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Media, a language model, captions, and repositories for pictures and sounds."""
    folder = tmp_path_factory.mktemp("world")
    save_media(folder / "media")
    save_language_model(folder / "llama", 512)
    for modality in ("image", "audio"):
        save_repository(folder / "languagebind" / f"LanguageBind_{modality}", modality)
    turns = [
        {"from": "human", "value": "What is this?\n<image>"},
        {"from": "gpt", "value": "It is a dog."},
    ]
    records = [{"id": n, "image": f"{n}.png", "conversations": turns} for n in range(6)]
    heard = [{**turns[0], "value": "What is this?\n<audio>"}, turns[1]]
    records.append({"id": 6, "audio": "tone.wav", "conversations": heard})
    write_jsonl(folder / "captions.jsonl", records)
    deep = [{**turns[0], "value": "What is this?\n<depth>"}, turns[1]]
    records.append({"id": 7, "depth": "depth.png", "conversations": deep})
    write_jsonl(folder / "more.jsonl", records)
    return folder


@pytest.fixture
def run(world: Path) -> Run:
    """Runs a command in the world; returns exit code, records, and stderr."""

    def run(*words: Any, stdin: str = "") -> tuple[int, list[dict[str, Any]], str]:
        done = chatbind(*words, cwd=world, stdin=stdin)
        records = [json.loads(line) for line in done.stdout.splitlines()]
        return done.returncode, records, done.stderr

    return run


ENCODE = ("encode", "--device", "cpu", "--encoder", "languagebind")


@pytest.mark.parametrize("where", ["threads", "processes"])
def test_media_are_encoded_wherever_they_are_decoded(run: Run, world: Path, where: str) -> None:
    code, found, _ = run(*ENCODE, "media/0.png", "media/tone.wav", "--decode-in", where)
    assert code == 0
    encoder = open_encoder(world / "languagebind")
    for record in found:
        medium = load_media(encoder.read, world / record["path"])
        wanted = encoder.embed([medium], normalize=True)[0]
        assert torch.equal(torch.tensor(record["embedding"]), wanted)
        assert record["encoder"] == f"languagebind@{encoder.sha256[:12]}"


def test_a_modality_that_is_not_there_is_one_line_that_names_those_that_are(run: Run) -> None:
    code, [record], _ = run(*ENCODE, "media/depth.png")
    assert code == 3
    assert record["error"] == (
        "media/depth.png: the encoder has no tower for depth, only for image, audio, text"
    )


def test_labels_get_the_probabilities_of_the_modalitys_own_scale(run: Run, world: Path) -> None:
    pytest.importorskip("open_clip")
    labels = world / "labels.txt"
    labels.write_text("dog\ncar\nbird\n")
    _, [record], _ = run(*ENCODE, "media/0.png", "--zero-shot", labels)
    encoder = open_encoder(world / "languagebind")
    medium = load_media(encoder.read, world / "media" / "0.png")
    texts = encoder.embed_texts(["a dog", "a car", "a bird"])
    scaled = encoder.embed([medium], normalize=False)
    assert torch.allclose(texts.norm(dim=1), torch.ones(3))
    likely = (scaled @ texts.T).softmax(dim=-1)[0].sort(descending=True).values
    assert [one["probability"] for one in record["labels"]] == pytest.approx(likely.tolist())


def train(*more: Any, data: str = "captions.jsonl") -> Sequence[Any]:
    return ("-m", "llama", "--data", data, "--media-root", "media", "--max-steps", 2, *more)


def test_media_that_it_does_not_know_are_found_before_training(run: Run, world: Path) -> None:
    words = train("--encoder", "languagebind", "-o", "none", data="more.jsonl")
    code, _, said = run("pretrain", *words)
    assert code == 1
    assert "languagebind knows image, audio; add an encoder that does" in said
    assert not (world / "none").exists()


def test_it_trains_and_answers(run: Run, world: Path) -> None:
    how = ("--encoder", "languagebind", "--embedding-cache", "none")
    code, _, said = run("pretrain", *train(*how, "-o", "one"))
    assert code == 0, said
    assert "licence of the weights of languagebind: MIT" in said
    projector = ("--projector", "one/projector.safetensors")
    # a second run reads the first one's embeddings
    stored = ("--store", "one/embeddings")
    code, _, said = run("finetune", *train(*projector, *stored, "-o", "two"))
    assert code == 0, said
    encoder = open_encoder(world / "languagebind")
    config = json.loads((world / "two" / "config.json").read_text())
    assert config["embedding_dim"] == DIM
    assert config["encoder"] == {
        "name": "languagebind",
        "sha256": encoder.sha256,
        "embedding_dim": DIM,
        "path": None,
        "dtype": "float32",
    }
    ask = ("ask", "-m", "two", "What is this?", "--json", "--max-new-tokens", "4")
    code, _, said = run(*ask, "--encoder", "languagebind", "-a", "media/1.png")
    assert code == 0, said
    vqa = ("vqa", "-m", "two", "--media-root", "media", "--encoder", "languagebind")
    media = ({"audio": "tone.wav"}, {"depth": "depth.png"})
    asked = [{"question_id": n, "text": "What is this?", **one} for n, one in enumerate(media)]
    code, [heard, lacking], _ = run(*vqa, stdin="".join(json.dumps(a) + "\n" for a in asked))
    assert code == 3
    settings = json.dumps(encoder.settings, sort_keys=True)
    assert heard["metadata"]["encoder_config_sha256"] == sha256_text(settings)
    assert "no tower for depth, only for image, audio, text" in lacking["error"]
    save_repository(world / "other" / "LanguageBind_Image", "image", hidden_act="quick_gelu")
    code, _, said = run(*ask, "--encoder", "other", "-a", "media/1.png")
    assert code == 1
    assert "the model was trained with the encoder languagebind" in said

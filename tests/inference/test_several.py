"""Answering with a model of two encoders: pictures and sounds go to one, motion to the other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from chatbind_cli import cli
from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.data.tokens import PromptEncoder
from chatbind_cli.encoders.identity import identity_of
from chatbind_cli.encoders.opening import open_encoders
from chatbind_cli.errors import (
    ChatBindError,
    CheckpointError,
    RecordError,
    SomeRecordsFailed,
    UsageError,
)
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.front import load_front, prompt_embeddings
from chatbind_cli.inference.loaded_model import LoadedModel, load_model
from chatbind_cli.inference.media_encoder import MediaEncoder, StoredEmbeddings
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.media.root import MediaRoot
from chatbind_cli.model.assemble import build_chatbind
from chatbind_cli.model.turns import question
from tests.encoders.languagebind.repositories import save_repository
from tests.inference.world import World, make_world, save_tiny_encoder
from tests.model.tiny import save_chatbind
from tests.serving.conftest import serving

WIDTHS = (12, 8)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The tiny world, with a model of LanguageBind and the tiny ImageBind."""
    world = make_world(tmp_path_factory.mktemp("both"))
    np.save(world.media / "moves.npy", np.random.default_rng(0).normal(size=(6, 2000)))
    for modality in ("image", "audio"):
        save_repository(world.folder / "lb" / modality, modality, dim=WIDTHS[0])
    encoder = open_encoders([world.folder / "lb", world.encoder])
    style = {"prompt_style": "vicuna_v1_1"}
    bundle = build_chatbind(world.llama, encoder=identity_of(encoder), **style)
    torch.manual_seed(5)
    for parameter in bundle.model.projector.parameters():
        torch.nn.init.normal_(parameter, std=3.0)
    shutil.rmtree(world.model)
    save_chatbind(bundle, world.model)
    return world


def told(world: World, folder: Path, change: Any) -> Path:
    """A copy of the model whose config says something else about its encoders."""
    shutil.copytree(world.model, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config["encoder"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rows_of(found: Sequence[Medium | ChatBindError]) -> torch.Tensor:
    rows = [item.embedding for item in found if isinstance(item, Medium)]
    return torch.stack([row for row in rows if row is not None])


def own_rows(world: World, names: Sequence[str]) -> list[torch.Tensor]:
    """What the encoder of each medium makes of it alone."""
    found = []
    for name in names:
        part = world.encoder if name in ("moves.npy", "depth.png") else world.folder / "lb"
        words = ["encode", "--no-normalize", "--device", "cpu", "--encoder", part]
        words += ["--modality", "imu"] if name == "moves.npy" else []
        done = CliRunner().invoke(cli.app, [*map(str, words), str(world.media / name)])
        found.append(torch.tensor(json.loads(done.stdout)["embedding"]))
    return found


def medium(world: World, name: str, weight: float = 1.0) -> Medium:
    kind = "imu" if name == "moves.npy" else None
    return Medium(kind, world.media / name, weight=weight)


NAMES = ["0.png", "moves.npy", "tone.wav", "depth.png"]


def test_the_prompt_has_what_each_projector_makes_of_its_encoders_embedding(both: World) -> None:
    loaded = load_model(both.model, device="cpu")
    found = MediaEncoder(loaded).embed(
        [medium(both, n, w) for n, w in zip(NAMES, (1, 0.5, 0, 1), strict=True)]
    )
    rows, weights = rows_of(found), torch.tensor([1.0, 0.5, 0.0, 1.0])
    with torch.inference_mode():
        soft = loaded.bundle.model.soft_tokens(rows, weights)
        for token, name, own, weight in zip(
            soft, NAMES, own_rows(both, NAMES), weights, strict=True
        ):
            part = loaded.bundle.model.projector.parts[int(name in ("moves.npy", "depth.png"))]
            wanted = part(torch.nn.functional.normalize(own, dim=0)[None] * weight)[0]
            torch.testing.assert_close(token, wanted)


def ask(world: World, *words: str | Path) -> Result:
    fixed = ["ask", "-m", world.model, "--device", "cpu", "--max-new-tokens", "5", "--json"]
    return CliRunner().invoke(cli.app, [*map(str, fixed), *map(str, words)])


def test_ask_reads_media_of_both_in_one_question(both: World) -> None:
    picture, moves = both.media / "0.png", both.media / "moves.npy"
    answers = []
    for words in (["-a", picture, "--imu", moves], ["-a", picture], ["--imu", moves], []):
        done = ask(both, "What is this?", *words)
        assert done.exit_code == 0, done.output
        answers.append(json.loads(done.stdout)["text"])
    assert len(set(answers)) == 4


def test_the_encoders_are_found_each_as_config_json_says(both: World, tmp_path: Path) -> None:
    def near(encoder: dict[str, Any]) -> None:
        encoder["parts"][0]["path"] = "../lb"

    def gone(encoder: dict[str, Any]) -> None:
        encoder["parts"][0]["path"] = "/gone/lb"

    model = told(both, tmp_path / "near", near)
    shutil.copytree(both.folder / "lb", tmp_path / "lb")
    found = load_model(model, device="cpu").find_encoder()
    assert [part.reference for part in found.parts] == [str(tmp_path / "lb"), str(both.encoder)]

    def elsewhere(encoder: dict[str, Any]) -> None:
        encoder["parts"][1]["path"] = "nobody:senses"

    model = told(both, tmp_path / "elsewhere", elsewhere)
    with pytest.raises(UsageError, match="no kind of encoder of that name is installed"):
        load_model(model, device="cpu").find_encoder()
    model = told(both, tmp_path / "gone", gone)
    with pytest.raises(
        CheckpointError, match="needs the encoder lb, which is not at /gone/lb any"
    ) as caught:
        load_model(model, device="cpu").find_encoder()
    assert "--encoder lb --encoder encoder" in str(caught.value)
    named = [both.folder / "lb", both.encoder]
    assert load_model(model, encoders=named, device="cpu").find_encoder().parts


def test_encoders_that_are_not_those_of_training_are_refused(both: World, tmp_path: Path) -> None:
    save_tiny_encoder(tmp_path / "other", seed=9)
    lb = both.folder / "lb"
    for named, message in (
        ([both.encoder, lb], "in another order: lb and encoder"),
        ([lb], "was trained with lb and encoder, not with lb;"),
        ([lb, tmp_path / "other"], r"the encoder encoder \(.*not with other .*allow-encoder-mism"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_model(both.model, encoders=named, device="cpu").find_encoder()
    how = {"encoders": [lb, tmp_path / "other"], "allow_encoder_mismatch": True}
    loaded = load_model(both.model, device="cpu", **how)
    told = MediaEncoder(loaded).identity()
    assert told["encoder_sha256"] == open_encoders(how["encoders"]).sha256  # type: ignore[arg-type]


def test_embeddings_of_two_encoders_are_not_mixed(both: World) -> None:
    answerer = Answerer(load_model(both.model, device="cpu"))
    found = MediaEncoder(load_model(both.model, device="cpu")).embed(
        [medium(both, name) for name in ("0.png", "tone.wav", "moves.npy")]
    )
    media = [item for item in found if isinstance(item, Medium)]
    mixed = answerer._mixed(media[:2]).embedding
    assert mixed is not None and not mixed[WIDTHS[0] :].any()
    with pytest.raises(RecordError, match="of several encoders cannot be mixed"):
        answerer._mixed(media)


def vqa(world: World, *words: str | Path) -> list[dict[str, Any]]:
    asked = [
        {"question_id": 1, "text": "What?", "image": "0.png"},
        {"question_id": 2, "text": "What?", "imu": "moves.npy"},
        {"question_id": 3, "text": "What?", "depth": "depth.png"},
    ]
    fixed = ["vqa", "-m", world.model, "--device", "cpu", "--max-new-tokens", "5", *words]
    done = CliRunner().invoke(
        cli.app, [*map(str, fixed)], input="".join(json.dumps(one) + "\n" for one in asked)
    )
    assert isinstance(done.exception, SomeRecordsFailed | None), done.exception
    return [json.loads(line) for line in done.stdout.splitlines()]


def encode(folder: Path, *words: str | Path) -> Path:
    fixed = ["encode", "--device", "cpu", "--store-dtype", "float32", "--store", folder, *words]
    assert CliRunner().invoke(cli.app, [*map(str, fixed)]).exit_code == 0
    return folder


def test_vqa_takes_embeddings_from_a_store_of_each_encoder_or_of_both(
    both: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(both.media)
    (tmp_path / "q.jsonl").write_text('{"image": "0.png"}\n{"imu": "moves.npy"}\n')
    lb, ib = ("--encoder", both.folder / "lb"), ("--encoder", both.encoder)
    run = tmp_path / "embeddings"  # as training leaves them
    seen = encode(run / "encoder-1", *lb, "0.png")
    moved = encode(run / "encoder-2", *ib, "--inputs", tmp_path / "q.jsonl")  # the picture, too
    wide = encode(tmp_path / "wide", *lb, *ib, "--inputs", tmp_path / "q.jsonl")
    loaded = load_model(both.model, device="cpu")
    media = [Medium("image", "0.png"), Medium("imu", "moves.npy")]
    direct = rows_of(MediaEncoder(loaded).embed(media))
    for stores in ([seen, moved], [run], [wide]):
        found = rows_of(StoredEmbeddings(stores, loaded, MediaOptions()).encode(media, []))
        assert torch.equal(found, direct)
    # the first store that has the picture is ImageBind's: its row goes to ImageBind's part
    turned = rows_of(StoredEmbeddings([moved, seen], loaded, MediaOptions()).encode(media, []))
    assert not turned[0, : WIDTHS[0]].any() and turned[0].any()
    answered = vqa(both, "--store", seen, "--store", moved)
    assert [one["text"] for one in answered] == [
        one["text"] for one in vqa(both, "--media-root", both.media)[:2]
    ] + [""]
    assert "is not in the store" in answered[2]["error"]
    save_tiny_encoder(tmp_path / "other", seed=9)
    other = encode(tmp_path / "others", "--encoder", tmp_path / "other", "0.png")
    with pytest.raises(AssertionError, match=r"which is none of the model's: lb and encoder"):
        vqa(both, "--store", other)


def test_the_server_s_embeddings_are_those_of_encode(both: World) -> None:
    loaded = load_model(both.model, device="cpu")
    root = MediaRoot.guarded(both.media, remote=False, most_bytes=1 << 20, seconds=5.0)
    asked = [
        {"type": "media", "url": "0.png"},
        {"type": "media", "modality": "imu", "url": "moves.npy"},
    ]
    with serving(Answerer(loaded, MediaEncoder(loaded, open_media=root.open))) as running:
        told = running.post("/v1/embeddings", json={"input": asked}).json()["data"]
    words = [
        "encode",
        "--device",
        "cpu",
        "--encoder",
        both.folder / "lb",
        "--encoder",
        both.encoder,
    ]
    for one, name in zip(told, NAMES, strict=False):
        kind = ["--modality", "imu"] if name == "moves.npy" else []
        done = CliRunner().invoke(cli.app, [*map(str, words), *kind, str(both.media / name)])
        np.testing.assert_array_equal(
            np.float32(one["embedding"]), np.float32(json.loads(done.stdout)["embedding"])
        )


def test_an_engine_gets_the_same_prompt(both: World) -> None:
    def prompt(loaded: LoadedModel) -> torch.Tensor:
        found = MediaEncoder(loaded).embed([medium(both, "moves.npy"), medium(both, "0.png")])
        turn = question("What is this?", [one for one in found if isinstance(one, Medium)])
        prompts = PromptEncoder(loaded.bundle.tokenizer, loaded.bundle.config, None)
        return prompt_embeddings(loaded, prompts.prompt([turn], None))

    front = prompt(load_front(both.model, dtype="float32", device="cpu"))
    torch.testing.assert_close(front, prompt(load_model(both.model, device="cpu")))


def test_options_that_none_takes_notice_of_are_told_once_and_change_nothing(
    both: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(both.model, device="cpu")
    media = [medium(both, "tone.wav"), medium(both, "moves.npy")]
    plain = rows_of(MediaEncoder(loaded).embed(media))
    capfd.readouterr()
    options = MediaOptions(audio_clips=5, imu_start_seconds=1.0)
    others = rows_of(MediaEncoder(loaded, options=options).embed(media))
    assert capfd.readouterr().err == "chatbind: lb+encoder takes no notice of --audio-clips\n"
    assert torch.equal(others[0], plain[0]) and not torch.equal(others[1], plain[1])
    words = ["--encoder", both.folder / "lb", "--audio-clips", "5", both.media / "tone.wav"]
    with EmbeddingStore.open(encode(tmp_path / "store", *words)) as store:
        assert store.kinds() == {("audio", MediaOptions().fingerprint("audio"))}

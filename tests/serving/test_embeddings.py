"""Embeddings of media and texts, asked by OpenAI's own client."""

from __future__ import annotations

import base64
import json

import numpy as np
import openai
import pytest
from click.testing import CliRunner

from chatbind_cli.cli import app
from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.media.modality import MODALITIES
from tests.inference.world import DIM
from tests.serving.conftest import serving


def embed(server, given, **more):
    return server.client.embeddings.create(model="model", input=given, **more).data


def vectors(server, given, **more):
    return [one.embedding for one in embed(server, given, **more)]


def named(modality, path):
    return {"type": "media", "modality": modality, "url": path.name}


def test_they_are_those_of_encode(running, media, text_encoder):
    told = vectors(running, [named(modality, media[modality]) for modality in MODALITIES])
    for modality, vector in zip(MODALITIES, told, strict=True):
        words = ["encode", "--encoder", str(text_encoder), "--modality", modality]
        done = CliRunner().invoke(app, [*words, str(media[modality])])
        assert done.exit_code == 0, done.output
        expected = json.loads(done.stdout)["embedding"]
        np.testing.assert_array_equal(np.float32(vector), np.float32(expected))
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    assert len({tuple(vector) for vector in told}) == len(MODALITIES)


def test_texts_go_through_the_text_tower_and_mix_with_media(running, media, text_encoder):
    pytest.importorskip("open_clip")
    picture = {"type": "image_url", "image_url": {"url": "2.png"}}
    text = {"type": "text", "text": "a red bird"}
    told = np.array(vectors(running, ["a dog", picture, text]))
    rows = open_encoder(text_encoder).embed_texts(["a dog", "a red bird"]).numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(told[[0, 2]], rows, atol=1e-6)
    assert vectors(running, "a dog") == [told[0].tolist()]
    assert vectors(running, [picture]) == [told[1].tolist()]


@pytest.mark.parametrize("form", ["float", "base64"])
def test_both_encodings_say_the_same(running, form):
    pytest.importorskip("open_clip")
    body = {"input": "a dog", "encoding_format": form, "model": "model", "user": "somebody"}
    reply = running.post("/v1/embeddings", json=body).json()
    told = reply["data"][0]["embedding"]
    if form == "base64":
        told = np.frombuffer(base64.b64decode(told), "<f4")
    np.testing.assert_array_equal(np.float32(told), np.float32(vectors(running, "a dog")[0]))
    assert len(told) == DIM and reply["data"][0]["index"] == 0 and reply["model"] == "model"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "1 to 256"),
        (["x"] * 257, "1 to 256"),
        ("", "input[0]"),
        ("x" * 20_000, "10,000 are the most"),
        ([1, 2], "input[0]"),
        ([[1, 2]], "input[0]"),
        ([None], "input[0]"),
        (["x", {"type": "media", "modality": "text", "url": "x"}], "input[1].modality"),
        ([{"type": "media", "url": "nothing.png"}], "nothing.png"),
        ([{"type": "media", "url": "/etc/passwd"}], "/etc/passwd"),
    ],
)
def test_what_has_no_embedding_is_a_400(running, given, says):
    with pytest.raises(openai.BadRequestError) as told:
        embed(running, given)
    assert says in told.value.message


def test_an_encoder_without_a_text_tower_says_so(world):
    with (
        serving(Answerer.from_pretrained(world.model, device="cpu")) as server,
        pytest.raises(openai.BadRequestError, match="no tower for text"),
    ):
        embed(server, "a dog")


def test_other_parameters_are_refused_by_name(running):
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        embed(running, "a dog", dimensions=4)
    with pytest.raises(openai.BadRequestError, match="encoding_format"):
        embed(running, "a dog", encoding_format="hex")
    with pytest.raises(openai.NotFoundError):
        running.client.embeddings.create(model="clip", input="a dog")

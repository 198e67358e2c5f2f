"""A model of several encoders: a projector for each, and who they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from chatbind_cli.checkpoints.extract_projector import extract_projector
from chatbind_cli.checkpoints.projector_file import ProjectorFile, read_projector, write_projector
from chatbind_cli.errors import CheckpointError
from chatbind_cli.model.assemble import build_chatbind
from chatbind_cli.model.chatbind import ChatBindConfig, ChatBindForConditionalGeneration
from chatbind_cli.model.config import EncoderInfo, check_encoder, encoder_of
from chatbind_cli.model.convert import convert
from chatbind_cli.model.loading import load_chatbind, load_into, projector_of
from chatbind_cli.model.projector import Projector
from tests.model.tiny import language_model, save_chatbind, save_language_model

SEES = EncoderInfo(name="sees", sha256="ab" * 32, embedding_dim=3, path="/sees", dtype="float32")
MOVES = EncoderInfo(name="moves", sha256="cd" * 32, embedding_dim=5, path="/moves")


def together(*parts: EncoderInfo) -> EncoderInfo:
    width = sum(part.embedding_dim for part in parts)
    return EncoderInfo(name="both", sha256="ef" * 32, embedding_dim=width, parts=parts)


BOTH = together(SEES, MOVES)


def config_of(encoder: dict[str, Any], **fields: Any) -> ChatBindConfig:
    fields = {"text_config": language_model().config, "embedding_dim": 8, **fields}
    return ChatBindConfig(encoder=encoder, **fields)


def chatbind(**fields: Any) -> ChatBindForConditionalGeneration:
    config = config_of(BOTH.as_record(), **fields)
    return ChatBindForConditionalGeneration(config, language_model()).eval()


def seen(number: int = 1) -> torch.Tensor:
    return functional.pad(torch.randn(number, 3), (0, 5))


def moved(number: int = 1) -> torch.Tensor:
    return functional.pad(torch.randn(number, 5), (3, 0))


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("layout", ["split", "repeat"])
def test_each_embedding_goes_through_the_part_of_its_encoder_alone(kind: str, layout: str) -> None:
    torch.manual_seed(0)
    projector = Projector([3, 5], 6, kind=kind, tokens=2, layout=layout)
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter)  # biases, too
    media = torch.cat([seen(), moved(2), seen()])
    weights = torch.tensor([1.0, 0.5, 0.0, 0.0])  # of weight 0 the bias of its own part is left
    first, second = projector.parts
    wanted = torch.cat(
        [
            first(media[:1, :3]),
            second(media[1:3, 3:], weights[1:3]),
            first(torch.zeros(1, 3)),
        ]
    )
    torch.testing.assert_close(projector(media, weights), wanted)
    assert not torch.equal(wanted[2], wanted[3])


def test_each_part_starts_anew_as_large_as_words() -> None:
    projector = Projector([32, 64], 256)
    projector.reset_parameters(std=0.5)
    vectors = functional.normalize(torch.randn(64, 96), dim=-1)
    for part, own in zip(projector.parts, vectors.split([32, 64], dim=-1), strict=True):
        found = part(functional.normalize(own, dim=-1)).std().item()
        assert found == pytest.approx(0.5, rel=0.1)


def test_all_parts_are_in_the_graph_and_only_those_that_saw_something_learn() -> None:
    projector = Projector([3, 5], 6)
    projector(moved(2)).sum().backward()
    gradients = {name: p.grad for name, p in projector.named_parameters()}
    assert list(gradients) == [
        "parts.0.layers.0.weight", "parts.0.layers.0.bias",
        "parts.1.layers.0.weight", "parts.1.layers.0.bias",
    ]  # fmt: skip
    told = [grad is not None and bool(grad.any()) for grad in gradients.values()]
    assert told == [False, False, True, True]
    assert all(grad is not None for grad in gradients.values())


def test_which_part_depends_on_no_size_so_that_it_is_compiled_once() -> None:
    projector = Projector([3, 5], 6, kind="mlp2x_gelu")
    exported = torch.export.export(projector, (torch.cat([seen(), moved(2)]),)).module()
    other = torch.cat([moved(2), torch.zeros(1, 8)])
    torch.testing.assert_close(exported(other), projector(other))


def test_an_embedding_of_nothing_but_zeros_is_a_token_of_zeros() -> None:
    model = chatbind()
    for parameter in model.projector.parameters():
        torch.nn.init.ones_(parameter)
    assert not model.soft_tokens(torch.zeros(1, 8)).any()


def test_bfloat16_goes_the_same_way() -> None:
    model = chatbind()
    media = torch.cat([seen(), moved()])
    exact = model.soft_tokens(media, torch.tensor([0.3, 1.0]))
    model.projector.to(torch.bfloat16)
    rounded = model.soft_tokens(media.bfloat16(), torch.tensor([0.3, 1.0])).float()
    # bfloat16 has 8 bits; products of 3 and 5 of them are added
    torch.testing.assert_close(rounded, exact, rtol=0.03, atol=0.003)


def test_a_built_model_and_its_projector_come_back_from_their_files(tmp_path: Path) -> None:
    base = save_language_model(tmp_path / "lm")
    built = build_chatbind(base, encoder=BOTH, projector_type="mlp2x_gelu", tokens_per_embedding=2)
    sizes = [
        part(torch.randn(200, w)).std()
        for part, w in zip(built.model.projector.parts, (3, 5), strict=True)
    ]
    assert all(0.003 < size < 0.3 for size in sizes)  # as words: each part was started anew
    save_chatbind(built, tmp_path / "model")
    loaded = load_chatbind(tmp_path / "model")
    assert encoder_of(loaded.config) == BOTH
    media = torch.cat([seen(), moved()])
    assert torch.equal(loaded.model.soft_tokens(media), built.model.soft_tokens(media))
    write_projector(tmp_path / "p.safetensors", projector_of(built.model))
    extract_projector(tmp_path / "model", tmp_path / "q.safetensors")
    for name in ("p", "q"):
        again = build_chatbind(base, encoder=BOTH, projector=tmp_path / f"{name}.safetensors")
        assert torch.equal(again.model.soft_tokens(media), built.model.soft_tokens(media))
    result = convert(tmp_path / "model", tmp_path / "shards", shard_bytes=20_000)
    assert torch.equal(
        load_chatbind(result.path).model.soft_tokens(media), loaded.model.soft_tokens(media)
    )
    with pytest.raises(CheckpointError, match="no room for the projectors of several encoders"):
        write_projector(tmp_path / "p.bin", projector_of(built.model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "projector.parts.1.layers.0.bias"}, r"no projector\.parts\.1\.layers\.0\.bias"),
        ({"add": "projector.layers.0.weight"}, r"has no projector\.layers\.0\.bias"),
        ({"add": "projector.layers.0.weight projector.layers.0.bias"}, "has also projector.parts"),
        ({"add": "projector.parts.7.layers.0.weight"}, "its projector has"),
        ({"add": "projector.parts.0.layers.2.weight"}, r"no projector\.parts\.0\.layers\.2\.bias"),
    ],
)  # fmt: skip
def test_a_file_whose_parts_do_not_go_together_is_refused(
    tmp_path: Path, change: dict[str, str], message: str
) -> None:
    path = tmp_path / "p.safetensors"
    write_projector(path, projector_of(chatbind()))
    tensors = load_file(path)
    if "drop" in change:
        del tensors[change["drop"]]
    else:
        for name in change["add"].split():
            tensors[name] = torch.ones(4, 4) if name.endswith("weight") else torch.ones(4)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        read_projector(path)


def test_parts_of_other_widths_do_not_fit_into_a_model() -> None:
    file = projector_of(chatbind())
    told = together(replace(SEES, embedding_dim=4), replace(MOVES, embedding_dim=4)).as_record()
    other = ChatBindForConditionalGeneration(config_of(told), language_model())
    with pytest.raises(CheckpointError, match=r"parts\.0\.layers\.0\.weight is \[32, 3\]"):
        load_into(other, file, "p")
    one = ProjectorFile(file.info, {n.replace("parts.0.", ""): t for n, t in file.tensors.items()})
    with pytest.raises(CheckpointError, match=r"parts\.0\.layers\.0\.weight is None"):
        load_into(chatbind(), one, "p")


def parts(*widths: Any) -> list[dict[str, Any]]:
    return [{"name": "x", "embedding_dim": width} for width in widths]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (parts(3, 4), r"have widths \[3, 4\], which do not make the embedding_dim of 8"),
        (parts(8), "no list of 2 to 8"),
        (parts(*[1] * 1_000_000), "no list of 2 to 8"),
        ({"0": 1}, "no list of 2 to 8"),
        (parts(9, -1), "embedding_dim is -1"),
        (parts(True, 7), "embedding_dim is True"),
        (parts(3.0, 5), "embedding_dim is 3.0"),
        (parts(8, None), "embedding_dim is None"),
        ([{"embedding_dim": 8}, 5], "which do not make"),
        ([{"embedding_dim": 3, "sha256": ["x"]}, *parts(5)], "sha256 is no text"),
    ],
)
def test_a_config_that_lies_about_its_encoders_is_refused(said: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        config_of({"parts": said})
    assert len(str(caught.value)) < 300


def test_an_encoder_s_record_says_what_is_known_and_comes_back() -> None:
    assert encoder_of(config_of(json.loads(json.dumps(BOTH.as_record())))) == BOTH
    assert "parts" not in SEES.as_record()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (SEES, r"was trained with sees and moves, not with sees; .*--encoder sees --encoder moves"),
        (together(MOVES, SEES), "the encoders in another order: sees and moves;"),
        (
            together(SEES, replace(MOVES, sha256="00" * 32, name="shakes")),
            r"with the encoder moves \(cdcdcdcdcdcd\), not with shakes \(000000000000\)",
        ),
        (
            together(replace(SEES, sha256=None, embedding_dim=4), MOVES),
            "reads embeddings of width 3, the encoder sees gives 4",
        ),
        (together(replace(SEES, dtype="bfloat16"), MOVES), "computed in float32, and these"),
    ],
)
def test_the_encoder_that_is_another_one_is_named(other: EncoderInfo, message: str) -> None:
    config = config_of(BOTH.as_record())
    with pytest.raises(CheckpointError, match=message):
        check_encoder(config, other)


def test_encoders_that_fit_pass() -> None:
    config = config_of(BOTH.as_record())
    check_encoder(config, BOTH)
    check_encoder(config, together(replace(SEES, dtype="bfloat16"), MOVES), same_dtype=False)
    unknown = replace(SEES, sha256=None), replace(MOVES, sha256=None)
    check_encoder(config, together(*unknown))
    with pytest.raises(CheckpointError, match="was trained with sees, not with sees and moves"):
        check_encoder(config_of(SEES.as_record(), embedding_dim=3), BOTH)

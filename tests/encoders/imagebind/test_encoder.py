"""The encoder: loading from disk, laziness, order, and independence of the batch."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatbind_cli.encoders.clip_text import tokenize
from chatbind_cli.encoders.encoder import Decoded, Encoder
from chatbind_cli.encoders.imagebind.config import HUGE, ImageBindConfig
from chatbind_cli.encoders.imagebind.encoder import ImageBindEncoder
from chatbind_cli.encoders.imagebind.model import ImageBind
from chatbind_cli.encoders.imagebind.weights import save_encoder
from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.errors import ChatBindError, UsageError, WeightsError
from chatbind_cli.media.source import MediaSource
from tests.inference.world import SIZES

TINY = ImageBindConfig(**SIZES)
SHAPES = {
    "image": (3, 224, 224),
    "video": (6, 3, 2, 224, 224),
    "audio": (3, 1, 128, 204),
    "depth": (1, 224, 224),
    "thermal": (1, 224, 224),
    "imu": (6, 2000),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoders") / "tiny"
    modalities = ["image", "audio", "depth", "thermal", "imu"]
    save_encoder(ImageBind(TINY, modalities), TINY, path)
    return path


def medium(modality: str, seed: int) -> Decoded:
    drawn = torch.Generator().manual_seed(seed)
    tensor = torch.randn(SHAPES[modality], generator=drawn)
    return Decoded(MediaSource(ref=f"{modality}-{seed}", data=b"x"), modality, tensor)


HOW = {
    "reference": "tiny",
    "device": torch.device("cpu"),
    "dtype": torch.float32,
    "batch_size": 16,
    "attn_implementation": "auto",
}


def embed_tensors(encoder: Encoder, modality: str, batch: torch.Tensor) -> torch.Tensor:
    source = MediaSource(ref=modality, data=b"x")
    return encoder.embed([Decoded(source, modality, tensor) for tensor in batch], normalize=False)


@pytest.mark.parametrize("name", ["imagebind_small.pth", "state_dict.safetensors"])
def test_both_file_formats_give_the_reference_outputs(name: str, golden: Path) -> None:
    source = golden / "imagebind_small"
    encoder = open_encoder(source / name)
    inputs = load_file(source / "inputs.safetensors")
    outputs = load_file(source / "outputs.safetensors")
    assert encoder.name == "imagebind_small"
    assert encoder.embedding_dim == 32
    assert encoder.sha256 == hashlib.sha256((source / name).read_bytes()).hexdigest()
    for key, modality in [("vision_video", "video"), ("imu", "imu"), ("text", "text")]:
        x = inputs[key] if modality == "text" else inputs[key].float()
        ours = embed_tensors(encoder, modality, x)
        error = (ours - outputs[key]).abs().amax(-1) / outputs[key].abs().amax(-1)
        assert error.max() <= 1e-5


def test_only_the_towers_that_are_asked_for_are_read(folder: Path) -> None:
    encoder = ImageBindEncoder(folder, **HOW)
    assert not encoder.loaded
    assert encoder.modalities == ("image", "video", "audio", "depth", "thermal", "imu")
    encoder.embed([medium("imu", 0)], normalize=True)
    assert list(encoder.loaded) == ["imu"]
    both = ImageBindEncoder(folder, **HOW)
    for modality in ("video", "depth", "image"):
        both.tower(modality)
    assert list(both.loaded) == ["image", "depth"]


def test_other_towers_may_even_be_unreadable(folder: Path, tmp_path: Path) -> None:
    """What is not asked for is not touched: the bytes of the other towers are gone."""
    copy = tmp_path / "tiny"
    shutil.copytree(folder, copy)
    weights = copy / "imagebind.safetensors"
    raw = bytearray(weights.read_bytes())
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    start = 8 + int.from_bytes(raw[:8], "little")
    for key, entry in header.items():
        if ".depth." not in key and key != "__metadata__":
            begin, end = entry["data_offsets"]
            raw[start + begin : start + end] = b"\xff" * (end - begin)  # NaN everywhere
    weights.write_bytes(raw)
    damaged = open_encoder(copy)
    expected = open_encoder(folder).embed([medium("depth", 1)], normalize=False)
    assert torch.equal(damaged.embed([medium("depth", 1)], normalize=False), expected)


def test_an_embedding_does_not_depend_on_what_else_is_embedded(folder: Path) -> None:
    encoder = open_encoder(folder)
    media = [medium(modality, seed) for seed in range(4) for modality in SHAPES]
    together = encoder.embed(media, normalize=False)
    alone = torch.cat([encoder.embed([one], normalize=False) for one in media])
    shuffled = torch.randperm(len(media), generator=torch.Generator().manual_seed(1)).tolist()
    mixed = encoder.embed([media[i] for i in shuffled], normalize=False)
    assert torch.equal(together, alone)  # bit for bit
    assert torch.equal(mixed, together[shuffled])
    assert together.dtype == torch.float32
    assert not together.is_inference()


def test_rows_are_scaled_as_published_or_have_norm_one(folder: Path) -> None:
    encoder = open_encoder(folder)
    media = [medium(modality, 3) for modality in ("image", "depth", "thermal", "imu")]
    published = encoder.embed(media, normalize=False).norm(dim=-1)
    torch.testing.assert_close(published, torch.tensor([1.0, 5.0, 10.0, 5.0]))
    media += [medium("audio", 3), medium("video", 3)]
    norms = encoder.embed(media, normalize=True).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(6))


@pytest.mark.parametrize("word", ["sdpa", "eager"])
def test_every_attention_gives_the_same_embeddings(word: str, folder: Path) -> None:
    media = [medium(modality, 4) for modality in ("image", "audio")]
    expected = open_encoder(folder).embed(media, normalize=True)
    found = open_encoder(folder, attn_implementation=word).embed(media, normalize=True)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_an_attention_that_cannot_work_here_is_one_line(folder: Path) -> None:
    with pytest.raises(UsageError, match="float16 or bfloat16, and here it runs on cpu in float32"):
        open_encoder(folder, attn_implementation="flash_attention_2")
    with pytest.raises(UsageError, match="--attn-implementation fast is not known"):
        open_encoder(folder, attn_implementation="fast")


def test_clips_are_averaged_after_scaling_and_not_normalised_again(folder: Path) -> None:
    encoder = open_encoder(folder)
    recording = medium("audio", 5)
    clips = embed_tensors(encoder, "audio", recording.tensor)  # a clip as an item of its own
    torch.testing.assert_close(clips.norm(dim=-1), torch.full((3,), 20.0))
    averaged = encoder.embed([recording], normalize=False)[0]
    torch.testing.assert_close(averaged, clips.mean(dim=0), atol=1e-4, rtol=0)


def test_nothing_in_gives_nothing_out(folder: Path) -> None:
    encoder = open_encoder(folder)
    assert encoder.embed([], normalize=True).shape == (0, 8)
    assert encoder.embed_texts([]).shape == (0, 8)


def test_a_saved_encoder_can_be_loaded_in_another_dtype(folder: Path) -> None:
    full = open_encoder(folder).embed([medium("thermal", 0)], normalize=True)
    half = open_encoder(folder, dtype=torch.bfloat16).embed([medium("thermal", 0)], normalize=True)
    assert half.dtype == torch.float32
    assert torch.cosine_similarity(full, half) > 0.999
    assert not torch.equal(full, half)


def test_a_tower_that_is_not_in_the_file_is_named(folder: Path) -> None:
    with pytest.raises(WeightsError, match="no tower for text, only for image"):
        embed_tensors(open_encoder(folder), "text", torch.zeros(1, 77, dtype=torch.long))


def changed(folder: Path, target: Path, **changes: torch.Tensor | None) -> Path:
    tensors = load_file(folder / "imagebind.safetensors")
    for key, tensor in changes.items():
        if tensor is None:
            del tensors[key]
        else:
            tensors[key] = tensor
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    save_file(tensors, target / "imagebind.safetensors")
    return target


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("modality_heads.imu.3.weight", torch.ones(8, 4), r"\[8, 4\] in the file and \[8, 16\] by"),
        ("modality_heads.imu.3.weight", None, r"absent in the file and \[8, 16\] by the config"),
        ("modality_heads.imu.9.bias", torch.ones(3), r"\[3\] in the file and absent by the config"),
        ("text_model.norm", torch.ones(3), r"\[3\] in the file and absent by the config"),
    ],
)
def test_the_first_key_that_differs_is_named_with_both_shapes(
    key: str, tensor: torch.Tensor | None, message: str, folder: Path, tmp_path: Path
) -> None:
    path = changed(folder, tmp_path / "changed", **{key: tensor})
    with pytest.raises(WeightsError, match=f"{key} is {message}"):
        open_encoder(path)


def test_weights_without_a_config_beside_them_must_be_huge(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "imagebind.safetensors", tmp_path / "some.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')  # says nothing about sizes
    with pytest.raises(WeightsError, match=r"is \[16\] in the file and \[768\] by the config"):
        open_encoder(tmp_path / "some.safetensors")


def test_huge_is_told_by_its_config(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = ImageBind(HUGE, ["imu"])
    drawn = torch.Generator().manual_seed(0)
    weights = {
        k: torch.randn(v.shape, generator=drawn) * 0.02 for k, v in model.state_dict().items()
    }
    torch.save(OrderedDict(weights), tmp_path / "any_name.pth")
    encoder = open_encoder(tmp_path / "any_name.pth")
    assert (encoder.name, encoder.embedding_dim) == ("imagebind_huge", 1024)
    assert encoder.embed([medium("imu", 0)], normalize=True).shape == (1, 1024)


def test_what_is_not_an_encoder_is_an_error_of_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such encoder"):
        open_encoder(tmp_path / "nothing.pth")
    with pytest.raises(WeightsError, match=r"must hold one weights file, not 0 \(none\)"):
        open_encoder(tmp_path)
    (tmp_path / "a.pth").write_bytes(b"not a zip file")
    with pytest.raises(WeightsError, match=r"a\.pth: is neither a safetensors nor a torch file"):
        open_encoder(tmp_path / "a.pth")
    torch.save({"state": {"a": torch.ones(1)}}, tmp_path / "b.pth")
    with pytest.raises(WeightsError, match="'state' is not a tensor but dict"):
        open_encoder(tmp_path / "b.pth")
    with pytest.raises(WeightsError, match=r"not 2 \(a\.pth, b\.pth\); give the file itself"):
        open_encoder(tmp_path)
    broken = tmp_path / "c.safetensors"
    broken.write_bytes((folder / "imagebind.safetensors").read_bytes()[:-10])
    with pytest.raises(WeightsError, match=r"c\.safetensors: not a valid safetensors file"):
        open_encoder(broken)


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code of the file was run",))


def test_a_pth_that_holds_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"a": _Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(WeightsError, match="holds .*print, which is no tensor"):
        open_encoder(tmp_path / "bomb.pth")
    assert capsys.readouterr().out == ""


def test_texts_become_the_ids_of_the_reference(golden: Path) -> None:
    source = golden / "imagebind_small"
    texts = json.loads((source / "texts.json").read_text())["texts"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever open_clip's many imports warn about
        ids = tokenize(texts, 77)
    assert torch.equal(ids, load_file(source / "inputs.safetensors")["text"])


def test_text_embeddings_carry_the_learned_scale(golden: Path) -> None:
    encoder: Encoder = open_encoder(golden / "imagebind_small" / "imagebind_small.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = encoder.embed_texts(["A dog.", "A car"])
    reference = load_file(golden / "imagebind_small" / "outputs.safetensors")["text"][:2]
    torch.testing.assert_close(rows, reference, rtol=0, atol=47e-5)  # 1e-5 of the magnitude
    torch.testing.assert_close(rows.norm(dim=-1), torch.full((2,), 100.0))


def test_without_the_extra_the_hint_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "open_clip.tokenizer", None)
    with pytest.raises(ChatBindError, match=r"pip install 'chatbind\[text\]'"):
        tokenize(["a dog"], 77)

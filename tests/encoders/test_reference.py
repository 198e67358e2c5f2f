"""What `--encoder` may say, and encoders that other packages bring."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from chatbind_cli.encoders.encoder import Decoded
from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.encoders.reference import is_reference, split_reference
from chatbind_cli.errors import ChatBindError, UsageError
from chatbind_cli.media.source import MediaSource

GOOD = """
from chatbind_cli.encoders.encoder import Encoder

class Grey(Encoder):
    sha256, settings, embedding_dim, modalities = "0" * 64, {}, 4, ("image",)
    def __init__(self, rest, **how):
        super().__init__(name=f"grey {rest}", **how)
    def load_tower(self, modality):
        return lambda batch: batch.mean(dim=1, keepdim=True)

class Unfinished(Encoder):
    pass

number = 3
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a package with entry points, `name = module:object`, where Python finds it."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(package: str, code: str, *points: str) -> None:
        (tmp_path / f"{package}.py").write_text(code)
        facts = tmp_path / f"{package}-1.2.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (facts / "entry_points.txt").write_text("[chatbind.encoders]\n" + "\n".join(points))

    return install


def test_a_path_that_is_there_wins_over_a_scheme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_reference("hf:owner/name@v1") == ("hf", "owner/name@v1")
    assert is_reference("timm:vit_tiny")
    assert not is_reference("checkpoints/imagebind")
    assert not is_reference("/a:b") and not is_reference("a/b:c")
    (tmp_path / "hf:owner").mkdir()
    assert not is_reference("hf:owner")
    assert is_reference("hf:" + "long" * 2000)


def test_a_scheme_that_nobody_brings_lists_those_that_are_there(install):
    install("grey_pictures", GOOD, "grey = grey_pictures:Grey", "hf = grey_pictures:Grey")
    for call in (is_reference, open_encoder):
        with pytest.raises(UsageError, match="one of grey:, hf:, timm:") as error:
            call("gray:x")
        assert "\n" not in str(error.value)
    assert "grey_pictures" not in sys.modules


def test_an_installed_encoder_is_opened_by_its_name_and_keeps_its_reference(
    install, tmp_path, monkeypatch
):
    install("grey_pictures2", GOOD.replace("Grey", "Grey2"), "grey = grey_pictures2:Grey2")
    monkeypatch.chdir(tmp_path)
    encoder = open_encoder("grey:v1", batch_size=3)
    assert (encoder.reference, encoder.name, encoder.batch_size) == ("grey:v1", "grey v1", 3)
    (tmp_path / "weights").mkdir()
    assert open_encoder("grey:weights").reference == f"grey:{tmp_path.resolve()}/weights"


def test_schemes_of_our_own_cannot_be_taken_over(install, monkeypatch, tmp_path):
    install("thief", "raise SystemExit(1)", "hf = thief:Grey")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="hf:OWNER/NAME"):
        open_encoder("hf:owner/name/file.bin")


@pytest.mark.parametrize(
    ("code", "point", "message"),
    [
        ("import nothing_here", "m:Grey", "ModuleNotFoundError"),
        (GOOD, "m:Missing", "AttributeError"),
        (GOOD, "m:number", "is no subclass of Encoder"),
        (GOOD, "m:Unfinished", "abstract"),
    ],
)
def test_a_broken_package_is_one_line_that_names_it(install, code, point, message):
    name = f"broken{abs(hash((code, point)))}"
    install(name, code, f"odd = {point.replace('m:', f'{name}:')}")
    with pytest.raises(ChatBindError, match=message) as error:
        open_encoder("odd:x")
    assert f"{name} 1.2" in str(error.value)
    assert "\n" not in str(error.value)


def test_two_packages_of_one_name_are_named(install):
    install("first_one", GOOD, "same = first_one:Grey")
    install("second_one", GOOD, "same = second_one:Grey")
    with pytest.raises(UsageError, match=r"(first|second)_one 1.2 and (first|second)_one 1.2"):
        open_encoder("same:x")


def test_a_tower_that_makes_another_shape_is_not_broadcast(install):
    install("narrow", GOOD, "grey = narrow:Grey")
    medium = Decoded(MediaSource("<x>", data=b""), "image", torch.ones(3))
    with pytest.raises(RuntimeError, match=r"shape '\[1, 4\]' is invalid for input of size 1"):
        open_encoder("grey:x").embed([medium], normalize=True)

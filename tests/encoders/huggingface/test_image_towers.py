"""Image encoders of transformers, against what transformers itself makes of the same folders."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    Blip2Config,
    Blip2Model,
    BlipImageProcessor,
    LlamaConfig,
)

from chatbind_cli.encoders.encoder import load_media
from chatbind_cli.encoders.huggingface.image_towers import Reader
from chatbind_cli.encoders.opening import open_encoder
from chatbind_cli.encoders.zero_shot import LabelScorer
from chatbind_cli.errors import ChatBindError, WeightsError
from chatbind_cli.model.pretrained import quiet_transformers

from .tiny import (
    KINDS,
    SIZES,
    SQUARE,
    TEXT,
    TWO_TOWERS,
    VISION,
    close,
    edit_json,
    edit_tensors,
    make,
)

TEXTS = ["a cat", "dogs", "a text of so many letters that its end has to be cut off"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    return {kind: make(kind, root / kind.replace(" ", "-")) for kind in KINDS}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = []
    for name, shape in (("wide", (50, 70, 3)), ("tall", (90, 33, 3)), ("grey", (40, 40))):
        paths.append(folder / f"{name}.png")
        Image.fromarray(random.integers(0, 255, shape, dtype=np.uint8)).save(paths[-1])
    return paths


def theirs(folder, pictures):
    """What transformers makes of each picture, of the texts, and of both; None if of pictures."""
    with quiet_transformers(), torch.inference_mode():
        model = AutoModel.from_pretrained(folder).eval()
        two = hasattr(model, "get_text_features")
        processor = (AutoProcessor if two else AutoImageProcessor).from_pretrained(folder)
        inputs = [
            processor(images=Image.open(picture).convert("RGB"), return_tensors="pt")
            for picture in pictures
        ]
        if not two:
            return [model(**one) for one in inputs], None, None
        texts = processor(
            text=TEXTS,
            padding="max_length" if model.config.model_type.startswith("siglip") else True,
            truncation=True,
            max_length=16,
            return_tensors="pt",
        )
        return (
            [model.get_image_features(**one) for one in inputs],
            model.get_text_features(**texts).pooler_output,
            model(**inputs[-1], **texts).logits_per_image[0].softmax(dim=0),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_transformers(kind, folders, pictures):
    folder = folders[kind]
    encoder = open_encoder(folder)
    rows = encoder.embed([load_media(encoder.read, path) for path in pictures], normalize=False)
    each, texts, chances = theirs(folder, pictures)
    for row, seen in zip(rows, each, strict=True):
        pooled = seen.last_hidden_state[:, 0] if "classifier" in kind else seen.pooler_output
        assert close(row, pooled.flatten())
    assert encoder.modalities == (("image", "text") if kind in TWO_TOWERS else ("image",))
    if kind in TWO_TOWERS:
        own = encoder.embed_texts(TEXTS)
        assert close(own, texts)
        assert torch.allclose(encoder.compare(rows[-1], own).softmax(dim=0), chances, atol=1e-6)
        scored = LabelScorer(encoder, TEXTS, "{label}").score(rows[-1], 3, "image")
        assert {one["label"]: one["probability"] for one in scored} == pytest.approx(
            dict(zip(TEXTS, chances.tolist(), strict=True)), abs=1e-6
        )
    alone = [encoder.embed([load_media(encoder.read, path)], normalize=False) for path in pictures]
    assert torch.equal(torch.cat(alone), rows)


@pytest.fixture
def copy(folders, tmp_path):
    return lambda kind: shutil.copytree(folders[kind], tmp_path / "copy")


def test_a_tower_is_read_when_it_is_needed(copy, pictures):
    folder = copy("clip")
    edit_tensors(folder, lambda found: found["text_projection.weight"].fill_(torch.nan))
    encoder = open_encoder(folder)
    assert encoder.loaded == {}
    encoder.embed([load_media(encoder.read, pictures[0])], normalize=True)
    assert list(encoder.loaded) == ["image"]
    with pytest.raises(WeightsError, match="text_projection.weight holds NaN"):
        encoder.embed_texts(["a"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["siglip2", "dinov2"])
def test_towers_run_in_half_precision(dtype, kind, folders, pictures):
    exact, half = (open_encoder(folders[kind], dtype=d) for d in (torch.float32, dtype))
    media = [load_media(exact.read, pictures[0])]
    wanted, rows = (one.embed(media, normalize=True) for one in (exact, half))
    assert half.tower("image").dtype == dtype
    assert rows.dtype == torch.float32
    assert torch.allclose(rows, wanted, atol=0.03)
    assert not torch.equal(rows, wanted)


def test_a_reader_goes_to_other_processes(folders, pictures):
    encoder = open_encoder(folders["siglip2"])
    sent = pickle.loads(pickle.dumps(encoder.read))
    first, second = (load_media(read, pictures[1]).tensor for read in (encoder.read, sent))
    assert torch.equal(first, second)
    assert len(pickle.dumps(encoder.read)) < 1000


def test_of_a_very_long_picture_the_middle_is_looked_at(copy, tmp_path):
    """Its long side would grow with its short one."""
    folder = copy("clip")
    said = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    edit_json(folder / "processor_config.json", image_processor={**said, "do_center_crop": False})
    Image.new("L", (5000, 2)).save(tmp_path / "line.png")
    read = Reader(folder)
    assert load_media(read, tmp_path / "line.png").tensor.shape == (3, 32, 8 * 32)


def test_only_pictures_are_known(folders, pictures):
    encoder = open_encoder(folders["dinov2"])
    for attempt in (lambda: encoder.tower("audio"), lambda: encoder.embed_texts(["a"])):
        with pytest.raises(WeightsError, match="has no tower for .*, only for image"):
            attempt()
    with pytest.raises(WeightsError, match="has no tower for thermal"):
        encoder.embed([load_media(encoder.read, pictures[0], "thermal")], normalize=False)


def test_identity_follows_what_decides_an_embedding(copy):
    folder = copy("clip")
    known = {open_encoder(folder).sha256}
    link = folder.with_name("link")
    link.symlink_to(folder)
    assert open_encoder(link).sha256 in known
    said = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    edit_json(folder / "processor_config.json", image_processor={**said, "image_mean": [0.1] * 3})
    known.add(open_encoder(folder).sha256)
    edit_json(folder / "tokenizer.json", version="2.0")
    known.add(open_encoder(folder).sha256)
    edit_tensors(folder, lambda found: found["logit_scale"].fill_(1.0))
    known.add(open_encoder(folder).sha256)
    assert len(known) == 4


def test_the_name_and_the_licence(copy):
    folder = copy("vit")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    encoder = open_encoder(folder)
    assert (encoder.name, encoder.licence) == ("copy", "apache-2.0")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "own"}, "'own', which transformers .* does not know"),
        ({"model_type": "own", "auto_map": {"AutoModel": "own.M"}}, "no code of a model folder"),
        ({"model_type": "videomae"}, "a videomae model is no encoder of pictures"),
        ({"model_type": "vit_mae"}, "patches drawn at random"),
        ({"model_type": "ijepa"}, "no one vector"),
        (
            {"model_type": "levit", "image_size": 10**9, "num_attention_heads": [4, 4, 4]},
            "10{9} pixels in patches",
        ),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "are quantised"),
    ],
)
def test_what_is_no_encoder_of_pictures_says_what_it_is(copy, changes, said):
    folder = copy("vit")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ChatBindError, match=said):
        open_encoder(folder)


def test_a_language_model_says_what_it_is(tmp_path):
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(ChatBindError, match="a llama model is no encoder of pictures; an encoder"):
        open_encoder(tmp_path)


def test_texts_that_pictures_are_not_compared_with_are_not_known(tmp_path, pictures):
    """BLIP-2's are what its language model goes on with."""
    words = {"model_type": "opt", "vocab_size": 20, "ffn_dim": 8, "num_hidden_layers": 1}
    words |= {"hidden_size": 8, "word_embed_proj_dim": 8, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config=VISION,
        qformer_config={**SIZES, "vocab_size": 20, "encoder_hidden_size": 32},
        text_config=words,
        num_query_tokens=2,
    )
    model = Blip2Model(config).eval()
    with quiet_transformers():
        model.save_pretrained(tmp_path)
    processor = BlipImageProcessor(size=SQUARE)
    processor.save_pretrained(tmp_path)
    encoder = open_encoder(tmp_path)
    assert encoder.modalities == ("image",)
    row = encoder.embed([load_media(encoder.read, pictures[0])], normalize=False)
    with torch.inference_mode():
        inputs = processor(Image.open(pictures[0]), return_tensors="pt")
        assert close(row, model.get_image_features(**inputs).pooler_output)


def test_a_foreign_config_beside_imagebind_says_nothing(tmp_path):
    save_file({"modality_heads.vision.2.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "imagebind"}')
    with pytest.raises(WeightsError, match="are these ImageBind's weights"):
        open_encoder(tmp_path)


def test_a_scale_that_is_none_is_told(copy):
    folder = copy("clip")
    edit_tensors(folder, lambda found: found["logit_scale"].fill_(1000.0))
    with pytest.raises(WeightsError, match="logit_scale is 1000"):
        open_encoder(folder)


def test_a_tokenizer_of_another_model_is_told(copy):
    folder = copy("clip")
    edit_json(folder / "config.json", text_config={**TEXT, "vocab_size": 100})
    words = "text_model.embeddings.token_embedding.weight"
    edit_tensors(folder, lambda found: found.update({words: found[words][:100].clone()}))
    with pytest.raises(WeightsError, match="tokenizer has more tokens"):
        open_encoder(folder).embed_texts(["a"])

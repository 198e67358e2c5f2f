"""The network against numbers and key lists of the reference implementation."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chatbind_cli.encoders.imagebind.config import HUGE, TOWER_OF, ImageBindConfig
from chatbind_cli.encoders.imagebind.layers import Block
from chatbind_cli.encoders.imagebind.model import ImageBind

# The reference's own float32 result differs from its float64 one by up to 3e-6 of the row's
# largest entry; 1e-5 is what the golden data calls sensible.
TOLERANCE = 1e-5
INPUTS = ["vision_image", "vision_video", "audio", "depth", "thermal", "imu", "text"]

Tensors = dict[str, torch.Tensor]


def modality_of(name: str) -> str:
    return name.removeprefix("vision_")


def largest_relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    difference = (ours.double() - reference.double()).abs().amax(-1)
    return float((difference / reference.double().abs().amax(-1)).max())


@pytest.fixture(scope="module")
def small(golden: Path) -> ImageBind:
    folder = golden / "imagebind_small"
    model = ImageBind(ImageBindConfig.from_json(folder / "config.json"))
    model.load_state_dict(load_file(folder / "state_dict.safetensors"))
    return model.eval()


@pytest.fixture(scope="module")
def tensors(golden: Path) -> dict[str, Tensors]:
    names = ("inputs", "outputs", "outputs_fp64", "intermediates")
    return {name: load_file(golden / "imagebind_small" / f"{name}.safetensors") for name in names}


def as_input(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return x if x.dtype == torch.int64 else x.to(dtype)


@pytest.mark.parametrize("name", INPUTS)
def test_outputs_agree_with_the_reference(
    name: str, small: ImageBind, tensors: dict[str, Tensors]
) -> None:
    with torch.inference_mode():
        ours = small(modality_of(name), as_input(tensors["inputs"][name]))
    assert ours.shape == tensors["outputs"][name].shape
    assert largest_relative_error(ours, tensors["outputs"][name]) <= TOLERANCE


@pytest.mark.parametrize("name", INPUTS)
def test_every_stage_agrees_with_the_reference(
    name: str, small: ImageBind, tensors: dict[str, Tensors]
) -> None:
    tower = TOWER_OF[modality_of(name)]
    seen: Tensors = {}

    def keep(stage: str) -> Any:
        return lambda _module, inputs, output: seen.update({stage: output})

    trunk = small.modality_trunks[tower]
    hooks = [
        trunk.register_forward_pre_hook(lambda _module, args: seen.update(tokens=args[0])),
        trunk.register_forward_hook(keep("trunk")),
        small.modality_heads[tower].register_forward_hook(keep("head")),
        small.modality_postprocessors[tower].register_forward_hook(keep("post_per_clip")),
    ]
    with torch.inference_mode():
        small(modality_of(name), as_input(tensors["inputs"][name]))
    for hook in hooks:
        hook.remove()
    for stage in ("tokens", "trunk", "head", "post_per_clip"):
        reference = tensors["intermediates"][f"{name}.{stage}"]
        ours = seen[stage][: len(reference)]
        assert largest_relative_error(ours, reference) <= TOLERANCE, stage


@pytest.mark.parametrize("name", INPUTS)
def test_float64_agrees_to_float64(
    name: str, small: ImageBind, tensors: dict[str, Tensors]
) -> None:
    x = as_input(tensors["inputs"][name], torch.float64)
    with torch.inference_mode():
        ours = deepcopy(small).double()(modality_of(name), x)
    # an error in the mathematics would not shrink with the precision
    assert largest_relative_error(ours, tensors["outputs_fp64"][name]) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", INPUTS)
def test_half_precision_keeps_the_direction(
    name: str, dtype: torch.dtype, small: ImageBind, tensors: dict[str, Tensors]
) -> None:
    x = as_input(tensors["inputs"][name])
    with torch.inference_mode():
        ours = deepcopy(small).to(dtype)(modality_of(name), x)
    cosine = torch.cosine_similarity(ours.double(), tensors["outputs_fp64"][name])
    # the reference itself reaches 0.9999 in bfloat16 and 0.999999 in float16
    assert ours.dtype == torch.float32
    assert cosine.min() >= (0.9998 if dtype == torch.bfloat16 else 0.999998)


def test_the_key_list_of_huge_is_the_published_one(golden: Path) -> None:
    listed = json.loads((golden / "imagebind_huge" / "keys.json").read_text())
    with torch.device("meta"):
        model = ImageBind(HUGE)
    parameters = dict(model.named_parameters())
    ours = [
        (
            key,
            list(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            "parameter" if key in parameters else "buffer",
        )
        for key, tensor in sorted(model.state_dict().items())
    ]
    assert ours == [(k["key"], k["shape"], k["dtype"], k["kind"]) for k in listed["keys"]]
    assert sum(p.numel() for p in parameters.values()) == 1_200_781_057


@pytest.mark.parametrize("modality", sorted(TOWER_OF))
def test_parameters_of_one_tower_are_those_that_the_golden_data_counts(
    modality: str, golden: Path
) -> None:
    counts = json.loads((golden / "imagebind_huge" / "keys.json").read_text())["counts"]
    with torch.device("meta"):
        model = ImageBind(HUGE, [modality])
    ours = sum(p.numel() for p in model.parameters())
    assert list(model.modality_trunks) == [TOWER_OF[modality]]
    assert ours == counts[TOWER_OF[modality]]["total_parameters"]


def test_tensors_of_huge_made_by_the_recipe_load_at_their_published_keys(golden: Path) -> None:
    listed = json.loads((golden / "imagebind_huge" / "keys.json").read_text())["keys"]
    with torch.device("meta"):
        model = ImageBind(HUGE, ["imu"])
    chosen = [k for k in listed if k["key"] in model.state_dict() and ".imu." in k["key"]]
    chosen = [k for k in chosen if "blocks." not in k["key"] or "blocks.3." in k["key"]]
    assert len(chosen) > 20
    recreated = {}
    for entry in chosen:
        drawn = torch.Generator().manual_seed(entry["seed"])
        tensor = torch.randn(entry["shape"], generator=drawn) * 0.02
        if "+" in entry["init"]:
            tensor += float(entry["init"].partition("+")[2])
        # re-creation is float32 arithmetic in one order; the checks are float64 sums of it
        total = float(tensor.double().sum())
        assert total == pytest.approx(entry["check"]["sum"], rel=1e-6, abs=1e-6)
        recreated[entry["key"]] = tensor
    left_out = model.load_state_dict(recreated, strict=False, assign=True)
    assert not left_out.unexpected_keys
    assert all("blocks." in key for key in left_out.missing_keys)


def test_text_does_not_see_what_comes_after_the_end_of_text(small: ImageBind) -> None:
    ids = torch.zeros(2, 77, dtype=torch.long)
    ids[:, :4] = torch.tensor([49406, 320, 1929, 49407])
    ids[1, 4:] = 320
    with torch.inference_mode():
        first, second = small("text", ids)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)  # at magnitude 40


@pytest.mark.parametrize(
    ("modality", "shape", "message"),
    [
        ("image", (1, 3, 200, 224), r"image must be \[n, 3, 224, 224\], not \[1, 3, 200, 224\]"),
        ("audio", (1, 0, 1, 128, 204), r"audio must be \[n, 1, 128, 204\]"),
        ("imu", (6, 2000), r"imu must be \[n, 6, 2000\], not \[6, 2000\]"),
    ],
)
def test_a_tensor_of_another_shape_is_refused(
    modality: str, shape: tuple[int, ...], message: str, small: ImageBind
) -> None:
    with pytest.raises(ValueError, match=message):
        small(modality, torch.zeros(shape))


def test_a_fresh_model_has_the_published_scales_and_learns() -> None:
    torch.manual_seed(0)
    config = ImageBindConfig(
        out_embed_dim=16,
        depth_embed_dim=16,
        depth_num_blocks=1,
        depth_num_heads=2,
        imu_embed_dim=16,
        imu_num_blocks=2,
        imu_num_heads=2,
        imu_head_dropout=0.0,
    )
    model = ImageBind(config, ["depth", "imu"])
    turns = torch.linspace(0, 60, 2000)
    pairs = {
        "depth": torch.stack([torch.full((1, 224, 224), k / 2 - 1.0) for k in range(4)]),
        "imu": torch.stack([torch.sin((k + 1) * turns).expand(6, -1) for k in range(4)]),
    }
    pairs["depth"][:, :, 100:120] = 1.5  # the stem's LayerNorm makes flat patches equal
    model.eval()
    for name, rows in pairs.items():
        torch.testing.assert_close(model(name, rows).norm(dim=-1), torch.full((4,), 5.0))

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    losses = []
    for _ in range(60):
        depth, imu = (model(name, rows) for name, rows in pairs.items())
        loss = torch.nn.functional.cross_entropy(depth @ imu.T / 5, torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]  # chance is ln 4 = 1.39
    assert all(p.grad is not None for p in model.parameters())


def test_query_key_and_value_are_drawn_as_matrices_of_their_own() -> None:
    width = 32
    block = Block(width, 4, bias_kv=False)
    for projection in block.attn.in_proj_weight.chunk(3):
        largest = projection.detach().abs().max().item()  # of 1024 draws, uniform in Xavier's range
        assert 0.98 * (3 / width) ** 0.5 < largest <= (3 / width) ** 0.5

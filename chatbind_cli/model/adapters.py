"""Low-rank adapters beside a language model's matrices: put there, merged, and in files of peft's.

LoRA (Hu et al., 2021): W x becomes W x + (alpha / r) B A x, and only A and B train. DoRA (Liu et
al., 2024) scales the rows of the sum to lengths that train, too. The arithmetic is `peft`'s; what
a folder may say is decided here: a few numbers and names, no other method, no code, no pickles.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.checkpoints.safetensors_file import open_safetensors
from chatbind_cli.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
ALL_LINEAR: Final = "all-linear"

_PREFIX: Final = "base_model.model."  # what peft's files have before a language model's names
_NAME: Final = "default"  # peft's name for the first adapter, which its files leave out
_DECIDING: Final = ("r", "lora_alpha", "lora_dropout", "target_modules", "fan_in_fan_out")
_SWITCHES: Final = ("use_dora", "use_rslora")
# what an adapter computes is the same whatever these say
_TOLD: Final = frozenset(
    {"base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"}
    | {"peft_type", "init_lora_weights"}
)


def lora_config(
    language_model: PreTrainedModel,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] = (ALL_LINEAR,),
    dora: bool = False,
) -> LoraConfig:
    """How adapters of rank `r` are put beside a language model's matrices.

    Args:
        language_model: whose they will be.
        r: rank.
        alpha: what they add is multiplied by `alpha / r`.
        dropout: share of an adapter's inputs that training leaves out.
        targets: last parts of the names of matrices (`q_proj`); `all-linear` stands for all but
            the output layer.
        dora: whether the lengths of the rows train, too.

    Raises:
        UsageError: no matrix has one of the names.
    """
    matrices = dict(_matrices(language_model))
    known = sorted({name.rpartition(".")[2] for name in matrices})
    wanted = known if list(targets) == [ALL_LINEAR] else sorted(set(targets))
    for name in wanted:
        if not any(_is_target(matrix, [name]) for matrix in matrices):
            raise UsageError(
                f"--lora-targets: the language model has no matrix {name!r}",
                hint=f"it has {', '.join(known)}",
            )
    return _config(
        r=r,
        # some readers want a whole number where it is one
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=dropout,
        target_modules=wanted,
        use_dora=dora,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in matrices.values()),
    )


def add_adapters(language_model: PreTrainedModel, config: LoraConfig) -> int:
    """Puts adapters beside matrices, in place; they train, in float32, and the rest does not.

    What they add is zero at first (their inner halves are random).

    Returns:
        How many matrices have one now.
    """
    from peft import inject_adapter_in_model  # noqa: PLC0415  seconds, which few runs need

    inject_adapter_in_model(config, language_model, adapter_name=_NAME)
    for _, parameter in adapter_parameters(language_model):
        # peft gives them the type of the frozen weights: small steps would be lost in bfloat16
        parameter.data = parameter.data.float()
    return sum(1 for _ in adapted_layers(language_model))


def adapters_of(language_model: PreTrainedModel) -> LoraConfig | None:
    """How the adapters of a language model were put there; None where it has none."""
    config: LoraConfig | None = getattr(language_model, "peft_config", {}).get(_NAME)
    return config


def adapter_parameters(language_model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapters' parameters, by the names that peft's files have for them."""
    for name, parameter in language_model.named_parameters():
        if "lora_" in name:
            plain = name.replace(f".{_NAME}", "")
            # peft saves the lengths of rows as a tensor, and holds them as a module
            yield _PREFIX + plain.replace("magnitude_vector.weight", "magnitude_vector"), parameter


@torch.no_grad()
def merge_adapters(language_model: PreTrainedModel) -> None:
    """Adds what adapters add to the matrices themselves, in place, one matrix at a time.

    The sum is rounded to the type of the matrix.
    """
    for name, layer in list(adapted_layers(language_model)):
        layer.merge()
        language_model.set_submodule(name, layer.get_base_layer())
    if hasattr(language_model, "peft_config"):
        del language_model.peft_config


def write_adapters(language_model: PreTrainedModel, folder: Path, base: Path) -> None:
    """Writes a language model's adapters as `peft` does, float32, without the model.

    Args:
        language_model: that has adapters.
        folder: where to, an existing folder.
        base: where the language model lies, for other programs.
    """
    config = adapters_of(language_model)
    assert config is not None
    saved = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "bias": "none",
        "inference_mode": True,
        "modules_to_save": None,
        "peft_version": config.peft_version,
        **_said(config),
    }
    text = json.dumps(saved, indent=2, sort_keys=True) + "\n"
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
    weights = {n: p.detach().cpu().contiguous() for n, p in adapter_parameters(language_model)}
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def read_adapters(language_model: PreTrainedModel, folder: Path) -> None:
    """Puts a folder's adapters beside a language model's matrices, in place.

    Shapes are compared before anything is made, so that no folder asks for more memory than its
    own file has bytes.

    Raises:
        CheckpointError: the folder says what is no LoRA of ours, or does not fit the model.
        WeightsError: its weights are no safetensors file, or a broken one.
    """
    config = _read_config(folder / ADAPTER_CONFIG)
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"has no {ADAPTER_WEIGHTS}", where=str(folder))
    found = {name: info.shape for name, info in open_safetensors(path).tensors.items()}
    wanted = dict(_shapes(language_model, config))
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            has, wants = (
                "is not there" if shape is None else f"is {list(shape)}"
                for shape in (found.get(name), wanted.get(name))
            )
            raise CheckpointError(
                f"{name} {has} in the file, and {wants} by {ADAPTER_CONFIG} and the language model",
                where=str(path),
            )
    add_adapters(language_model, config)
    saved = load_file(path)
    with torch.no_grad():
        for name, parameter in adapter_parameters(language_model):
            if not saved[name].isfinite().all():
                raise CheckpointError(f"{name} holds numbers that are not finite", where=str(path))
            parameter.copy_(saved[name])


def _config(**said: Any) -> LoraConfig:
    from peft import LoraConfig  # noqa: PLC0415  seconds, which few runs need

    return LoraConfig(task_type="CAUSAL_LM", **said)


def _said(config: LoraConfig) -> dict[str, Any]:
    """What decides an adapter's numbers, in JSON's types."""
    values = {name: getattr(config, name) for name in (*_DECIDING, *_SWITCHES)}
    return {**values, "target_modules": sorted(config.target_modules or ())}


def _read_config(path: Path) -> LoraConfig:
    """An adapter's description, of which nothing but numbers, switches and names is taken.

    Raises:
        CheckpointError: it is another method's, or leads elsewhere.
    """
    if not path.is_file():
        raise CheckpointError(f"has no {ADAPTER_CONFIG}", where=str(path.parent))
    fields = read_json(path, most_bytes=1 << 20)
    if fields.get("peft_type") != "LORA":
        raise CheckpointError(f"is of the method {fields.get('peft_type')!r:.40}", where=str(path))
    said = {"lora_dropout": 0.0, "fan_in_fan_out": False, **dict.fromkeys(_SWITCHES, False)}
    said |= {name: fields[name] for name in (*_DECIDING, *_SWITCHES) if name in fields}
    _check_kinds(said, path)
    neutral = _config().to_dict()
    for key, value in fields.items():
        if key not in said and key not in _TOLD and value != neutral.get(key):
            raise CheckpointError(
                f"says {key[:60]} = {value!r:.60}, which no adapter of ChatBind's has",
                where=str(path),
            )
    return _config(**said)


def _check_kinds(said: Mapping[str, Any], path: Path) -> None:
    """Refuses values that are no such numbers, switches or names.

    Raises:
        CheckpointError: there is one.
    """

    def number(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    rank, names = said.get("r"), said.get("target_modules")
    fine = {
        "r": type(rank) is int and rank > 0,
        "lora_alpha": number(said.get("lora_alpha")),
        "lora_dropout": number(said["lora_dropout"]) and 0 <= said["lora_dropout"] < 1,
        # a text would be a pattern, and may take for ever
        "target_modules": isinstance(names, list)
        and 0 < len(names) < 1000
        and all(isinstance(name, str) and name for name in names),
        **{name: type(said[name]) is bool for name in ("fan_in_fan_out", *_SWITCHES)},
    }
    for name, good in fine.items():
        if not good:
            raise CheckpointError(f"says {name} = {said.get(name)!r:.60}", where=str(path))


def _matrices(language_model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """The matrices that adapters may stand beside, by name: all but the output layer."""
    output = language_model.get_output_embeddings()
    for name, module in language_model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output:
            yield name, module


def _is_target(matrix: str, targets: Sequence[str]) -> bool:
    return any(matrix == name or matrix.endswith(f".{name}") for name in targets)


def _shapes(
    language_model: PreTrainedModel, config: LoraConfig
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor in the file of such adapters.

    Raises:
        CheckpointError: no matrix, or something else than a matrix, has one of the names.
    """
    matrices = dict(_matrices(language_model))
    for name, _ in language_model.named_modules():
        if not _is_target(name, sorted(config.target_modules or ())):
            continue
        if name not in matrices:
            raise CheckpointError(f"an adapter goes beside {name}, which is no matrix")
        rows, columns = _sides(matrices[name])
        yield f"{_PREFIX}{name}.lora_A.weight", (config.r, columns)
        yield f"{_PREFIX}{name}.lora_B.weight", (rows, config.r)
        if config.use_dora:
            yield f"{_PREFIX}{name}.lora_magnitude_vector", (rows,)


def _sides(module: nn.Module) -> tuple[int, int]:
    """How many numbers a matrix gives, and how many it takes."""
    if isinstance(module, Conv1D):
        columns, rows = module.weight.shape
        return rows, columns
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def adapted_layers(language_model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """The layers of peft, by the names of the matrices that they stand for."""
    for name, module in language_model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            yield name, module

"""How a language model is shared out over processes (FSDP2), and gathered again.

PyTorch's own `fully_shard` does it before the Trainer sees the model, and accelerate's plugin is
left out: that one lets no CPUs take part, keeps the gradients of the whole model while they
accumulate, and reads its settings from the environment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from chatbind_cli.console import note
from chatbind_cli.errors import UsageError
from chatbind_cli.training.settings import TrainingSettings


@dataclass(frozen=True)
class Sharding:
    """How a model is shared out.

    Attributes:
        reshard: gather a layer's weights anew for the backward pass; else they stay from the
            forward pass on (ZeRO-2).
        layers: classes that are shared out one by one; empty: those that the model names.
    """

    reshard: bool = True
    layers: tuple[str, ...] = ()


def sharding_of(settings: TrainingSettings, world_size: int) -> Sharding | None:
    """How the settings want the model shared out; None where that has no effect, which is said."""
    if not settings.fsdp:
        return None
    needless = None
    if not settings.backbone_trains:
        needless = "the projector alone trains, and it is small"
    elif world_size == 1:
        needless = "there is one process, and so nothing to share out"
    if needless:
        note(f"--fsdp has no effect: {needless}")
        return None
    return Sharding(
        reshard="shard_grad_op" not in settings.fsdp.split(), layers=settings.fsdp_layers
    )


def shard(model: nn.Module, how: Sharding, device: torch.device, *, bf16: bool) -> None:
    """Shares a model out over all processes; each holds the same part of every parameter.

    Layers compute in bfloat16 if `bf16`, and in what their weights are otherwise; gradients are
    summed in float32 after every pass, so that no process keeps those of the whole model.

    Args:
        model: changed in place. Only process 0 needs to hold its weights; on the others it may be
            on the `meta` device.
        how: see there.
        device: where this process works.
        bf16: whether layers compute in bfloat16.

    Raises:
        UsageError: the model has no layers of a class that `how` names.
    """
    first = dist.get_rank() == 0
    weights = model.state_dict() if first else {}
    loose = [list(_loose_tensors(model)) if first else None]
    dist.broadcast_object_list(loose, 0)
    _to_meta(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # media are normalised in float32
    )
    for layer in _layers(model, how.layers):
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=how.reshard)
    # embeddings and output layer are needed first and last: they stay whole during a step
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    model.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    for place, name, value in loose[0] or ():
        setattr(model.get_submodule(place), name, value.to(device))
    # the Trainer's library would wrap it once more
    model._is_accelerate_prepared = True  # type: ignore[assignment]


def _loose_tensors(model: nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Tensors of no state: buffers that are not saved, attributes; module, name and value."""
    for place, module in model.named_modules():
        held = {**vars(module), **{n: module._buffers[n] for n in module._buffers}}
        for name, value in held.items():
            if isinstance(value, torch.Tensor):
                yield place, name, value.detach().cpu()


def _to_meta(model: nn.Module) -> None:
    """Lets go of a model's weights; tied ones stay tied, which `Module.to` would undo."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and old not in made:
                made[old] = nn.Parameter(torch.empty_like(old, device="meta"), old.requires_grad)
            module._parameters[name] = made[old] if old is not None else None


def _layers(model: nn.Module, classes: tuple[str, ...]) -> list[nn.Module]:
    names = set(classes)
    if not names:
        for module in model.modules():
            names.update(getattr(module, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise UsageError(
            f"the model has no layers of the class {', '.join(sorted(names)) or 'it names'}",
            hint="name one with --fsdp-transformer-layer-cls-to-wrap",
        )
    return layers


def is_sharded(model: nn.Module) -> bool:
    """Whether a model is shared out over processes."""
    return isinstance(model, FSDPModule)


def make_whole(model: nn.Module) -> None:
    """Makes the parameters that train whole again, and the word embeddings; training is over then.

    For models of which no more than these is written: adapters, a projector.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for module in model.modules():
        for name, part in module.named_parameters(recurse=False):
            if isinstance(part, DTensor) and (
                part.requires_grad or isinstance(module, nn.Embedding)
            ):
                whole = part.full_tensor().cpu()
                module._parameters[name] = nn.Parameter(whole, part.requires_grad)


def gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights of a model that is shared out, in main memory; on process 0, else nothing.

    One tensor at a time is whole on the others. Tied weights are one tensor under several names.
    """
    whole: dict[int, torch.Tensor] = {}
    state = {}
    for name, part in model.state_dict(keep_vars=True).items():
        if id(part) not in whole:
            tensor = part.detach()
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()
            # others keep nothing of it, but wait for it: else they would hold all that are coming
            first = dist.get_rank() == 0
            whole[id(part)] = tensor.cpu() if first else tensor.flatten()[:0].clone()
        state[name] = whole[id(part)]
    return state if dist.get_rank() == 0 else {}

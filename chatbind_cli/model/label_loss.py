"""The loss of a language model where there are labels, without logits anywhere else.

Of a batch of captions one position in five has a label, and logits are as wide as the vocabulary.
How a language model comes from its last hidden states to its loss is its own business (Gemma-2
bounds its logits, Granite divides them, Mixtral adds a loss of its router), so it is asked, see
`loss_way`, and no list of names is needed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

LossWay = Literal["linear", "own", "plain"]
"""How the loss at labels alone can be had from a language model.

`linear`: its logits are its output layer's, its loss their cross-entropy. `own`: it makes logits
and loss itself, from those hidden states alone that it is handed. `plain`: neither is the same, so
it makes logits everywhere.
"""

IGNORE_INDEX: Final = -100
"""The label of a token that is read but not learned (PyTorch's cross entropy skips it)."""

_LOGITS: Final = 2**27  # at most at a time: 512 MiB in float32


def loss_at_labels(
    language_model: PreTrainedModel,
    way: LossWay,
    positions: torch.Tensor,
    labels: torch.Tensor,
    num_items: torch.Tensor | None,
    step_share: float | None = None,
    **inputs: Any,
) -> CausalLMOutputWithPast:
    """A forward pass with a loss, but with logits at some positions only; they are not returned.

    Args:
        language_model: any causal language model.
        way: see `loss_way`.
        positions: int64 [n], those of the flattened batch that predict a label.
        labels: [batch, length], not shifted.
        num_items: what the summed loss is divided by; None for a mean.
        step_share: see `shared_loss`.
        **inputs: of the language model, `inputs_embeds` among them.
    """
    targets = labels.flatten()[positions + 1]
    base = language_model.get_decoder()
    if way == "linear":
        states = base(**inputs).last_hidden_state.flatten(0, 1)[positions]
        return CausalLMOutputWithPast(
            loss=linear_loss(states, language_model.get_output_embeddings(), targets, num_items)
        )
    if num_items is not None:
        inputs["num_items_in_batch"] = num_items
    if way == "plain":
        output = language_model(labels=labels, **inputs)
    else:
        with _handing_on(base, lambda states: states.flatten(0, 1)[positions].unsqueeze(0)):
            targets = targets.unsqueeze(0)
            output = language_model(labels=targets, shift_labels=targets, **inputs)
    return CausalLMOutputWithPast(loss=shared_loss(language_model, output, step_share))


def shared_loss(
    language_model: PreTrainedModel, output: Any, step_share: float | None
) -> torch.Tensor:
    """The loss of a pass, in which what the language model adds (of its router) has its share.

    What is added is a mean over a pass, and not over a step's labels: added up over the passes of
    all processes it would count once for each of them.

    Args:
        language_model: which knows the weight of what it adds.
        output: of it.
        step_share: what the pass is of its step; None: it stands alone.
    """
    added = getattr(output, "aux_loss", None)
    weight = getattr(language_model, "router_aux_loss_coef", None)
    loss: torch.Tensor = output.loss
    if step_share is None or added is None or weight is None:
        return loss
    return loss - (1 - step_share) * weight * added.to(loss.device)


def linear_loss(
    states: torch.Tensor, head: nn.Module, targets: torch.Tensor, num_items: torch.Tensor | None
) -> torch.Tensor:
    """The cross-entropy of an output layer's logits, in float32, never with all logits at once.

    Args:
        states: [n, width], last hidden states.
        head: the output layer, [n, width] -> [n, vocabulary].
        targets: int64 [n].
        num_items: what the sum is divided by; None for a mean.
    """
    total = states.new_zeros((), dtype=torch.float32)
    if _fused(states, head):
        total = _liger_loss(states, head, targets)
    else:
        size = max(1, _LOGITS // _vocabulary(head))
        for part, wanted in zip(states.split(size), targets.split(size), strict=True):
            if len(states) <= size:
                total = total + _summed(part, head, wanted)
            else:  # else all logits would be kept for the backward pass after all
                total = total + checkpoint(_summed, part, head, wanted, use_reentrant=False)
    return total / (len(targets) if num_items is None else num_items.to(total.device))


def _summed(states: torch.Tensor, head: nn.Module, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(head(states).float(), targets, reduction="sum")


def _vocabulary(head: nn.Module) -> int:
    size = getattr(head, "out_features", None)
    return int(size) if size else max(p.shape[0] for p in head.parameters())


def _fused(states: torch.Tensor, head: nn.Module) -> bool:
    """Whether liger-kernel has a kernel for it: one matrix that this GPU holds whole."""
    return (
        states.is_cuda
        and len(states) > 0
        and type(head) is nn.Linear
        and type(head.weight.data) is torch.Tensor  # a sharded one is gathered in the layer's call
        and importlib.util.find_spec("liger_kernel") is not None
    )


def _liger_loss(states: torch.Tensor, head: Any, targets: torch.Tensor) -> torch.Tensor:
    """The summed loss by liger-kernel's fused kernel, in what the layer would compute in."""
    from liger_kernel.transformers import (  # noqa: PLC0415
        LigerFusedLinearCrossEntropyLoss,
    )

    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
    total = LigerFusedLinearCrossEntropyLoss(reduction="sum")(
        weight, states.to(dtype), targets, bias
    )
    return total.float()


@contextmanager
def _handing_on(base: nn.Module, change: Any) -> Iterator[None]:
    """Within, the last hidden states of a model's body reach what comes after it changed."""

    def hook(module: nn.Module, args: object, output: Any) -> Any:
        output.last_hidden_state = change(output.last_hidden_state)
        return output

    handle = base.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def loss_way(language_model: PreTrainedModel, width: int) -> LossWay:
    """Finds out how a language model makes its loss, by trying it on hidden states of our own.

    The states are as large as makes it visible that logits are bounded or divided. No random state
    is touched.

    Args:
        language_model: any, in any dtype; its mode is the same afterwards.
        width: of its word embeddings.
    """
    base, head = language_model.get_decoder(), language_model.get_output_embeddings()
    if base is language_model or head is None:
        return "plain"
    weight = next(language_model.parameters())
    random = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {
        "inputs_embeds": torch.randn(1, 6, width, generator=random).to(weight),
        "attention_mask": torch.ones(1, 6, dtype=torch.long, device=weight.device),
        "use_cache": False,
    }
    labels = torch.tensor(
        [[IGNORE_INDEX, 3, 1, IGNORE_INDEX, 2, IGNORE_INDEX]], device=weight.device
    )
    positions = torch.tensor([0, 1, 3], device=weight.device)
    made: list[torch.Tensor] = []

    def large(states: torch.Tensor) -> torch.Tensor:
        scale = 10 / head(states).float().std().clamp(min=1e-6)
        made.append((states.float() * scale).to(states.dtype))
        return made[-1]

    training, kernels = language_model.training, language_model.config._attn_implementation
    language_model.eval()
    language_model.config._attn_implementation = "eager"  # which works on every device
    try:
        with _handing_on(base, large):
            wanted = language_model(labels=labels, **inputs).loss
            own = loss_at_labels(language_model, "own", positions, labels, None, **inputs).loss
        shifted = functional.pad(labels, (0, 1), value=IGNORE_INDEX)[0, 1:]
        linear = linear_loss(made[0][0], head, shifted, torch.tensor(len(positions)))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return "plain"  # it has no such body, or does not take what others take
    finally:
        language_model.train(training)
        language_model.config._attn_implementation = kernels
    assert wanted is not None
    assert own is not None
    if torch.allclose(linear, wanted.float(), rtol=1e-6, atol=0):
        return "linear"
    # fewer rows are multiplied, and so sums are rounded in another order
    return "own" if torch.allclose(own.float(), wanted.float(), rtol=1e-2, atol=0) else "plain"

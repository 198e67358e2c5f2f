"""What a run will take, by arithmetic: memory of each process, and room on the disk.

Estimates, told before anything heavy begins; what a run really took is in its log.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from chatbind_cli.training.settings import TrainingSettings

_MASTER, _GRADIENT, _ADAM = 4, 4, 8  # bytes a trained number: float32, and AdamW's two averages
_HALF = 2
_PACKED = 0.6  # of four bits, and the scales of each block; word embeddings stay as they are
# numbers that a LLaMA's layer keeps for the backward pass, for each token and number of its width:
# inputs and outputs of its norms, matrices and attention, and four times the wider middle (2.7)
_KEPT = 19
_LOGITS = 10  # bytes: the half-precision logit, its float32 copy and gradient
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """The sizes of a language model that memory follows from.

    Attributes:
        numbers: of all weights.
        adapted: rows plus columns of all matrices that adapters would go beside.
        layers, width, vocabulary: as in its configuration.
    """

    numbers: int
    adapted: int
    layers: int
    width: int
    vocabulary: int

    @classmethod
    def of(cls, config: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]) -> Shape:
        """Reads them off a configuration and the shapes of the weights, by name."""
        inner = config.get("text_config")
        fields = {**(inner if isinstance(inner, Mapping) else {}), **config}
        matrices = [s for name, s in shapes.items() if len(s) == 2 and ".layers." in name]

        def read(*names: str) -> int:
            return next((int(str(fields[n])) for n in names if fields.get(n)), 0)

        return cls(
            numbers=sum(map(math.prod, shapes.values())),
            adapted=sum(map(sum, matrices)),
            layers=read("num_hidden_layers", "n_layer"),
            width=read("hidden_size", "n_embd"),
            vocabulary=read("vocab_size"),
        )


@dataclass(frozen=True)
class Needs:
    """Bytes that a process needs at the peak of a step.

    Attributes:
        weights: frozen and trained ones, and their copies in half precision.
        training: gradients and the optimizer's averages.
        activations: what the backward pass needs of the forward pass, and the logits.
    """

    weights: float
    training: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.training + self.activations


def memory_needed(
    settings: TrainingSettings, shape: Shape, *, tokens: int, half: bool, shards: int = 1
) -> Needs:
    """What one process needs.

    Args:
        settings: of the run.
        shape: of the language model.
        tokens: of a forward pass, padding included.
        half: whether it computes in half precision.
        shards: over how many processes the model is shared out.
    """
    trained = _trained(settings, shape)
    left = 0 if settings.matrices_train else shape.numbers
    size = _HALF if half else _MASTER
    packed = _PACKED if settings.load_in_4bit else size
    copies, sums = float(_HALF * trained) if half else 0.0, 0.0
    if shards > 1:
        # embeddings and output layer are whole during a step, and two layers at a time
        ends = 2 * shape.vocabulary * shape.width
        layer = (shape.numbers - ends) / max(1, shape.layers)
        copies = size * (ends + 2 * layer)
        sums = 0 if settings.lora_r else (size + _GRADIENT) * max(ends, layer)
    kept = _KEPT * size * shape.width * tokens
    if settings.gradient_checkpointing is True:
        activations = kept + size * shape.width * tokens * shape.layers
    else:
        activations = kept * shape.layers
    return Needs(
        weights=(left * packed + trained * _MASTER) / shards + copies,
        training=trained * (_GRADIENT + _ADAM) / shards + sums,
        # about half of the tokens are answers
        activations=activations + tokens / 2 * shape.vocabulary * _LOGITS,
    )


def _trained(settings: TrainingSettings, shape: Shape) -> int:
    """How many numbers of the language model, or of adapters in it, train."""
    if not settings.backbone_trains:
        return 0
    return settings.lora_r * shape.adapted if settings.lora_r else shape.numbers


def disk_needed(settings: TrainingSettings, shape: Shape, *, half: bool) -> tuple[float, float]:
    """Bytes of the result, and of one checkpoint."""
    trained = _trained(settings, shape)
    whole = settings.stage == "finetune" and not settings.lora_r
    result = shape.numbers * (_HALF if half else _MASTER) if whole else trained * _MASTER
    return result, trained * (_MASTER + _ADAM)


def advice(
    settings: TrainingSettings, shape: Shape, *, tokens: int, half: bool, room: float, gpus: int
) -> str | None:
    """The first thing that would make a run fit into `room` bytes a process, if one would."""
    changes = [("--gradient-checkpointing yes", replace(settings, gradient_checkpointing=True), 1)]
    saving = changes[0][1]
    one = replace(saving, per_device_train_batch_size=1)
    few = f"--per-device-train-batch-size 1 and {changes[0][0]}"
    changes.append((few, one, 1))
    if gpus > 1 and settings.backbone_trains and not settings.load_in_4bit:
        changes.append((f'--fsdp "full_shard auto_wrap" over {gpus} GPUs', saving, gpus))
    per_sample = max(1, tokens // settings.per_device_train_batch_size)
    for words, changed, shards in changes:
        n = per_sample * changed.per_device_train_batch_size
        if memory_needed(changed, shape, tokens=n, half=half, shards=shards).total <= room:
            return words
    if settings.lora_r:
        return "--load-in-4bit" if gpus and not settings.load_in_4bit else None
    return "--lora-r 64" if settings.matrices_train else None

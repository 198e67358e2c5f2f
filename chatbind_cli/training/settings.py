"""What a training run was told: one frozen object from the command line to the workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from chatbind_cli.encoders.reference import is_reference
from chatbind_cli.errors import UsageError
from chatbind_cli.media.root import MediaRoot
from chatbind_cli.training.data_files import DataFile

Stage = Literal["pretrain", "finetune"]
_FSDP = ("full_shard", "shard_grad_op", "auto_wrap")


def place_of(encoder: str) -> str:
    """What an encoder is known by: its whole path, or a reference as it stands."""
    return encoder if is_reference(encoder) else str(Path(encoder).resolve())


def one_or_several(values: Sequence[str]) -> str | list[str] | None:
    """A value that mostly stands alone, in JSON's types."""
    return list(values) if len(values) > 1 else next(iter(values), None)


def _resolved(folders: Sequence[Path]) -> list[str]:
    return [str(folder.resolve()) for folder in folders]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """A training run. Sizes are counts; rates are those of the optimizer.

    What is not compared says how the work is done: a run may be continued with another value.

    Raises:
        UsageError: a number is out of its range, or two values exclude each other.
    """

    stage: Stage
    model: Path
    data: tuple[DataFile, ...]
    output: Path = field(compare=False)

    # media and their embeddings
    media_root: MediaRoot = field(default_factory=MediaRoot)
    encoders: tuple[str, ...] = ()  # what `open_encoder` takes
    # embeddings made before, of each encoder: then neither encoders nor media are needed
    stores: tuple[Path, ...] = ()
    embedding_cache: Path | None = field(default=None, compare=False)  # of all runs

    # the model; what is None comes from the projector file, else from the first of the choices
    projector: Path | None = None
    projector_type: str | None = None
    tokens_per_embedding: int | None = None
    use_start_end: bool | None = None
    prompt_style: str | None = None
    freeze_backbone: bool = False
    lora_r: int | None = None  # rank of adapters; None: none
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    lora_targets: tuple[str, ...] | None = None
    lora_dora: bool | None = None
    load_in_4bit: bool | None = None
    model_max_length: int = 2048

    # optimization
    num_train_epochs: float = 1.0
    max_steps: int = -1
    per_device_train_batch_size: int = field(default=16, compare=False)
    per_device_eval_batch_size: int = field(default=4, compare=False)
    gradient_accumulation_steps: int = field(default=1, compare=False)
    global_batch_size: int | None = field(default=None, compare=False)  # in place of the former
    group_by_length: bool = False  # it decides which samples make a step
    packing: bool = field(default=False, compare=False)
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    warmup_steps: int | None = None
    lr_scheduler_type: str = "cosine"
    optim: str | None = None
    max_grad_norm: float = 1.0
    seed: int = 0
    embedding_noise: float = 0.0  # in norms of an embedding
    eval_data: Path | None = field(default=None, compare=False)
    eval_strategy: str = field(default="no", compare=False)
    eval_steps: float | None = field(default=None, compare=False)

    # numbers and machines
    device: str = field(default="auto", compare=False)
    dtype: str = "auto"
    attn_implementation: str = field(default="auto", compare=False)
    bf16: bool | None = None
    fp16: bool | None = None
    tf32: bool | None = None
    gradient_checkpointing: bool | None = field(default=None, compare=False)
    loss_at_labels: bool = field(default=True, compare=False)
    share_prefix: bool = field(default=True, compare=False)
    compile: bool = field(default=False, compare=False)
    fsdp: str = field(default="", compare=False)
    fsdp_layers: tuple[str, ...] = field(default=(), compare=False)
    dataloader_num_workers: int | None = field(default=None, compare=False)

    # what is kept and shown
    save_strategy: str = field(default="steps", compare=False)
    save_steps: float = field(default=500, compare=False)
    save_total_limit: int | None = field(default=None, compare=False)
    save_dtype: str = field(default="auto", compare=False)
    logging_steps: float = field(default=1, compare=False)
    report_to: tuple[str, ...] = field(default=(), compare=False)
    plot: Path | None = field(default=None, compare=False)
    on_error: str = field(
        default="fail", compare=False
    )  # what a run left out is kept in its folder
    check: str = field(default="sample", compare=False)
    overwrite: bool = field(default=False, compare=False)
    command: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for name, value in ((f.name, getattr(self, f.name)) for f in fields(self)):
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"--{name.replace('_', '-')} is {value:g}, which is no number")
        if self.bf16 and self.fp16:
            raise UsageError("--bf16 and --fp16 exclude each other")
        if self.eval_strategy != "no" and self.eval_data is None:
            raise UsageError(
                f"--evaluation-strategy {self.eval_strategy} needs held-out conversations",
                hint="give them with --eval-data, or say --evaluation-strategy no",
            )

        self._check_encoders()
        if self.matrices_train and self.dtype in ("float16", "bfloat16"):
            mixed = "--bf16" if self.dtype == "bfloat16" else "--fp16"
            raise UsageError(
                f"--dtype {self.dtype} would train weights that most steps are too small to change",
                hint=f"say {mixed}, which computes so, and keeps the trained weights in float32",
            )
        self._check_adapters()
        self._check_sharding()

    def _check_encoders(self) -> None:
        encoders, stores = [place_of(one) for one in self.encoders], _resolved(self.stores)
        for name, places in (("encoder", encoders), ("store", stores)):
            if twice := next((p for p in places if places.count(p) > 1), None):
                raise UsageError(f"--{name} {twice} is named twice")
        if self.encoders and self.stores and len(self.encoders) != len(self.stores):
            raise UsageError(
                f"{len(self.encoders)} --encoder and {len(self.stores)} --store: embeddings are "
                "in a store of their own for each encoder",
                hint="name them in the same order, or no --encoder",
            )

    def _check_adapters(self) -> None:
        words = ("lora_alpha", "lora_dropout", "lora_targets", "lora_dora", "load_in_4bit")
        for name in words if self.lora_r is None else ():
            if getattr(self, name):
                raise UsageError(f"--{name.replace('_', '-')} needs --lora-r")
        if self.lora_r is None:
            return
        if self.freeze_backbone:
            raise UsageError("--freeze-backbone trains no adapters, and --lora-r asks for them")
        if self.save_dtype not in ("auto", "float32"):
            raise UsageError(f"adapters are saved in float32, not in {self.save_dtype}")

    def _check_sharding(self) -> None:
        words = self.fsdp.split()
        if "offload" in words:
            raise UsageError(
                "--fsdp offload is not supported",
                hint="share the model out over more GPUs, or train adapters (--lora-r 64)",
            )
        for word in words:
            if word not in _FSDP:
                raise UsageError(
                    f"--fsdp does not know {word!r}", hint=f"it takes {', '.join(_FSDP)}"
                )
        if words and (self.fp16 or self.load_in_4bit):
            other = "--fp16" if self.fp16 else "--load-in-4bit"
            raise UsageError(f"--fsdp goes with --bf16 or float32, not with {other}")

    @property
    def backbone_trains(self) -> bool:
        """Whether the language model is changed by training, itself or by adapters."""
        return self.stage == "finetune" and not self.freeze_backbone

    @property
    def matrices_train(self) -> bool:
        """Whether the language model's own weights train, and not adapters beside them."""
        return self.backbone_trains and self.lora_r is None

    def samples_per_step(self, world_size: int) -> int:
        """The samples of an optimizer step, over all processes."""
        passes = self.gradient_accumulation_steps * world_size
        return self.global_batch_size or self.per_device_train_batch_size * passes

    def identity(self, world_size: int) -> dict[str, Any]:
        """The values that decide the result, but for the encoders, in JSON's types.

        How a global batch is split over processes is left out: it changes sums only by rounding.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        del values["encoders"]  # without any, the inputs say which are taken
        # as versions that took one store have it
        values["store"] = one_or_several(_resolved(values.pop("stores")))
        values["data"] = [str(replace(file, path=file.path.resolve())) for file in self.data]
        root = self.media_root
        values["media_root"], values["media_prefix"] = root.folder, root.prefix
        values["allow_outside"] = root.allow_outside
        values["global_batch_size"] = self.samples_per_step(world_size)
        return {
            key: str(value.resolve()) if isinstance(value, Path) else value
            for key, value in values.items()
        }

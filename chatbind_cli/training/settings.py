"""What a training run was told: one frozen object from the command line to the workers.

Knows which of the values decide the result and which only say how the work is done; a run may be
continued with other values of the second kind.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal

from chatbind_cli.errors import UsageError
from chatbind_cli.media.root import MediaRoot

Stage = Literal["pretrain", "finetune"]

PICTURES: Final = (".svg", ".png", ".pdf")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """A training run. Sizes are counts; rates are those of the optimizer.

    Raises:
        UsageError: a number is out of its range, or two values exclude each other.
    """

    stage: Stage
    model: Path
    data: Path
    output: Path

    # media and their embeddings
    media_root: MediaRoot = field(default_factory=MediaRoot)
    encoder: Path | None = None
    store: Path | None = None  # embeddings made before: then neither encoder nor media are needed

    # the model; what is None comes from the projector file, else from the first of the choices
    projector: Path | None = None
    projector_type: str | None = None
    tokens_per_embedding: int | None = None
    use_start_end: bool | None = None
    prompt_style: str | None = None
    freeze_backbone: bool = False
    model_max_length: int = 2048

    # optimization
    num_train_epochs: float = 1.0
    max_steps: int = -1
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    warmup_steps: int | None = None
    lr_scheduler_type: str = "cosine"
    optim: str | None = None
    max_grad_norm: float = 1.0
    seed: int = 0
    eval_data: Path | None = None
    eval_strategy: str = "no"
    eval_steps: float | None = None

    # numbers and machines
    device: str = "auto"
    dtype: str = "auto"
    attn_implementation: str = "auto"
    bf16: bool | None = None
    fp16: bool | None = None
    tf32: bool | None = None
    gradient_checkpointing: bool | None = None
    fsdp: str = ""
    fsdp_layers: tuple[str, ...] = ()
    dataloader_num_workers: int = 0

    # what is kept and shown
    save_strategy: str = "steps"
    save_steps: float = 500
    save_total_limit: int | None = None
    logging_steps: float = 1
    report_to: tuple[str, ...] = ()
    plot: Path | None = None
    on_error: str = "fail"
    overwrite: bool = False
    command: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for name, value in ((f.name, getattr(self, f.name)) for f in fields(self)):
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"--{name.replace('_', '-')} is {value:g}, which is no number")
        if self.plot is not None and self.plot.suffix.lower() not in PICTURES:
            raise UsageError(
                f"--plot {self.plot} has no suffix that we draw",
                hint=f"end it in one of {', '.join(PICTURES)}",
            )
        if self.bf16 and self.fp16:
            raise UsageError("--bf16 and --fp16 exclude each other")
        if self.eval_strategy != "no" and self.eval_data is None:
            raise UsageError(
                f"--evaluation-strategy {self.eval_strategy} needs held-out conversations",
                hint="give them with --eval-data, or say --evaluation-strategy no",
            )

    def identity(self, world_size: int) -> dict[str, Any]:
        """The values that decide the result, in JSON's types.

        How a global batch is split over processes is left out: it changes sums only by rounding.

        Args:
            world_size: the number of processes.
        """
        values = {k: v for k, v in asdict(self).items() if k not in _NOT_IDENTITY}
        root = self.media_root
        values["media_root"], values["media_prefix"] = root.folder, root.prefix
        values["allow_outside"] = root.allow_outside
        values["global_batch_size"] = (
            self.per_device_train_batch_size * self.gradient_accumulation_steps * world_size
        )
        return {
            key: str(value.resolve()) if isinstance(value, Path) else value
            for key, value in values.items()
        }


_NOT_IDENTITY = {
    "output",
    "device",
    "attn_implementation",
    "gradient_checkpointing",
    "fsdp",
    "fsdp_layers",
    "dataloader_num_workers",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "eval_data",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "report_to",
    "plot",
    "on_error",  # what a run left out is kept in its folder
    "overwrite",
    "command",
}

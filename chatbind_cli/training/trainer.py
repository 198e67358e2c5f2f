"""The Trainer of transformers, with checkpoints that are small, and whole or not there at all.

A checkpoint holds the parameters that train (not the frozen ones), the optimizer, the scheduler,
every process's random state and the step. It grows in a staging folder and gets its name last.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, send_to_device
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerState, TrainingArguments

from chatbind_cli import stopping, worker
from chatbind_cli.console import note
from chatbind_cli.data.lookup import WideEmbeddings
from chatbind_cli.data.tokens import PromptEncoder
from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration
from chatbind_cli.model.loading import ChatBind
from chatbind_cli.training.arguments import on_gpu
from chatbind_cli.training.batches import Share, Steps, StepSamples, tensors
from chatbind_cli.training.checkpointing import GpuMemory, Trial
from chatbind_cli.training.compiling import compile_layers
from chatbind_cli.training.hangs import noticed_soon
from chatbind_cli.training.held_out import held_out_batches, held_out_loss
from chatbind_cli.training.inputs import Inputs
from chatbind_cli.training.log import TrainingLog
from chatbind_cli.training.positions import WithPositions
from chatbind_cli.training.prefix import SharedPrefix
from chatbind_cli.training.rundir import LOG_FILE, STAGING, RunFolder
from chatbind_cli.training.samples import Collator, TrainingSamples
from chatbind_cli.training.saved import check_optimizer, check_weights, saving
from chatbind_cli.training.settings import TrainingSettings
from chatbind_cli.training.sharded_trainer import WEIGHTS, ShardedTrainer
from chatbind_cli.training.sharding import gathered, is_sharded
from chatbind_cli.training.stages import write_stage_1
from chatbind_cli.training.throughput import Meter, ModelFlops, peak_flops
from chatbind_cli.training.watch import Watch

_MULTIPLE_ON_GPU = 8  # lengths that tensor cores like


class ChatBindTrainer(ShardedTrainer):
    """A Trainer of one stage, that saves what trains.

    Args:
        settings: of the run.
        inputs: its conversations.
        embeddings: of all their media.
        bundle: the model, of which that is free which is to train.
        folder: the run's folder.
        arguments: see `training_arguments`.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        inputs: Inputs,
        embeddings: WideEmbeddings,
        bundle: ChatBind,
        folder: RunFolder,
        arguments: TrainingArguments,
    ) -> None:
        samples = partial(
            TrainingSamples,
            encoder=PromptEncoder(bundle.tokenizer, bundle.config),
            embeddings=embeddings,
            max_length=settings.model_max_length,
        )
        pad, config = bundle.tokenizer.pad_token_id, bundle.config
        multiple = _MULTIPLE_ON_GPU if on_gpu(settings) else 1
        frozen = not settings.backbone_trains
        collate = WithPositions(
            Collator(pad, multiple), config, at_labels=settings.loss_at_labels, frozen=frozen
        )
        self._log = TrainingLog(folder.path / LOG_FILE)
        trained_on = samples(inputs.conversations)
        super().__init__(
            model=bundle.model,
            args=arguments,
            data_collator=collate,
            train_dataset=trained_on,
            eval_dataset=samples(inputs.held_out) if len(inputs.held_out) else None,
            callbacks=[self._log],
        )
        # it would print Python dictionaries between the records
        self.remove_callback(PrinterCallback)
        self._steps = Steps(settings, trained_on, collate, bundle.model)
        self.add_callback(self._steps)
        # the Trainer has turned the cache off in the configuration; those who load it want it on
        bundle.config.use_cache = True
        computing = torch.bfloat16 if arguments.bf16 else torch.float16
        mixed = arguments.bf16 or arguments.fp16
        peak = peak_flops(arguments.device, computing) if mixed else None
        self._meter = Meter(ModelFlops.of(bundle.model), peak)
        self._watch = Watch(
            inputs.conversations,
            self._total,
            scaled=arguments.fp16,
        )
        self.add_callback(self._watch)
        self._settings = settings
        self._bundle = bundle
        self._folder = folder
        self._make_fast(bundle.model)
        self._memory = self._memory_trial(trained_on)

    def _make_fast(self, model: ChatBindForConditionalGeneration) -> None:
        """Sets up what the switches of speed ask for."""
        settings = self._settings
        if settings.loss_at_labels:  # one process may be the only one that has the weights
            found = model.find_loss_way() if worker.rank() == 0 else None
            model.loss_way = broadcast_object_list([found])[0]
        shared = settings.share_prefix and not settings.backbone_trains
        self._prefix = SharedPrefix(model, self.accelerator.autocast, wanted=shared)
        if settings.compile:
            compile_layers(model.language_model)

    def fit(self) -> None:
        """Trains from the newest complete checkpoint on, if there is one."""
        checkpoint = self._folder.last_checkpoint()
        state = TrainerState()
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            note(f"going on from step {state.global_step} of {state.max_steps}")
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._folder.clear_staging()
            self._folder.cut_log(state.global_step)
        self.accelerator.wait_for_everyone()
        if checkpoint is not None and state.global_step >= state.max_steps > 0:
            # the Trainer would take one more step
            self._load_from_checkpoint(str(checkpoint))
        else:
            with self._log, noticed_soon():
                self._meter.restart()
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Steps: to the Trainer, batches."""
        return self._steps.loader(self.args)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss on held-out conversations, a mean over their labelled tokens."""
        samples, collate = self.eval_dataset, cast(WithPositions, self.data_collator)
        assert isinstance(samples, TrainingSamples)
        size, world = self.args.per_device_eval_batch_size, self.accelerator.num_processes
        share, sizes = Share(worker.rank(), world, size), samples.conversations.sizes()
        steps = StepSamples(samples, collate, share, sizes)
        batches = held_out_batches(steps, self.args.dataloader_num_workers)
        self.trained.eval()
        loss = held_out_loss(batches, self._held_out_loss, self._total)
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _held_out_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        del batch["work"], batch["samples"]
        inputs = {**self._prepare_inputs(batch), "step_share": 0.0}
        loss: torch.Tensor = self.compute_loss(self.trained, inputs)
        return loss

    def _total(self, found: torch.Tensor) -> torch.Tensor:
        """A tensor added up over all processes."""
        summed: torch.Tensor = self.accelerator.reduce(found, "sum")
        return summed

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | int | None]:
        """A step, whose work is counted, and the number of its labels in all processes."""
        # loaders that start now are to live on, see `leave_to_parent`
        with stopping.unheard(signal.SIGTERM):
            step = next(self._meter.waiting(epoch_iterator))
        for batch in step["passes"]:
            self._meter.add(batch.pop("work"))
        self._watch.begin([batch.pop("samples") for batch in step["passes"]])
        passes = tensors(step["passes"], pin=self.args.dataloader_pin_memory)
        step["passes"] = send_to_device(passes, device, non_blocking=True)
        return [step], self._get_num_items_in_batch(step["passes"], device)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The loss of a batch, of which what all rows begin with may be computed already."""
        if self._memory is not None and model.training:
            trial, self._memory = self._memory, None
            tried = self._prefix.cut(inputs)
            trial(tried, inputs["input_ids"].shape[1] - tried["input_ids"].shape[1])
        return super().compute_loss(model, self._prefix.cut(inputs), *args, **kwargs)

    def _memory_trial(self, samples: TrainingSamples) -> Trial | None:
        """The first step's, where a GPU's memory is to decide about gradient checkpointing."""
        auto = self._settings.gradient_checkpointing is None
        if not auto or self.args.device.type != "cuda" or is_sharded(self.trained):
            return None
        most = self._settings.model_max_length
        if not self._settings.packing:  # which fills up to the brim
            longest = int(samples.conversations.sizes().argmax())
            most = len(samples.tokens(longest).input_ids)
        return Trial(
            self._bundle.model,
            GpuMemory(self.args.device),
            self.args.per_device_train_batch_size,
            most,
            lambda mine: bool(
                self.accelerator.reduce(torch.tensor(float(mine)).to(self.args.device))
            ),
        )

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The passes of a step; returns its loss. Processes add up their gradients at the last."""
        passes = inputs["passes"]
        self.current_gradient_accumulation_steps = len(passes)
        state = self.accelerator.gradient_state
        losses = []
        share = 1 / (len(passes) * self.accelerator.num_processes)
        for batch in passes:
            last = batch is passes[-1]
            state._set_sync_gradients(last)  # DeepSpeed takes its step by it
            each = last or state.plugin_kwargs.get("sync_each_batch", False)
            with nullcontext() if each else self.accelerator.no_sync(model):
                inputs = {**batch, "step_share": share}
                loss = super().training_step(model, inputs, num_items_in_batch)
            losses.append(self._watch.saw(loss))
        return torch.stack(losses).sum()

    def _get_grad_norm(
        self, model: nn.Module, grad_norm: torch.Tensor | float | None = None
    ) -> torch.Tensor | float | None:
        """The gradient's norm, which is asked for last before the optimizer changes anything."""
        norm: torch.Tensor | float | None = super()._get_grad_norm(model, grad_norm)
        self._watch.check(norm, self.state.global_step + 1, stop=stopping.requested())
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the rates since the last record to it."""
        if "loss" in logs:
            counts = torch.tensor(
                self._meter.counts(), dtype=torch.float32, device=self.args.device
            )
            summed = self.accelerator.reduce(counts, "sum").tolist()
            logs |= self._meter.rates(summed, self.accelerator.num_processes)
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(super()._get_output_dir(trial)) / STAGING)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with saving(self._folder.path / STAGING):
            super()._save_checkpoint(model, trial)
            # every process has written its random state before the folder may count as complete
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                staged = self._folder.path / STAGING / f"checkpoint-{self.state.global_step}"
                if self._settings.stage == "pretrain":
                    write_stage_1(self._bundle, staged)  # a projector that can be taken from it
                if (staged / "optimizer.pt").exists():
                    check_optimizer(staged / "optimizer.pt")
                self._folder.publish_checkpoint(staged, self._settings.save_total_limit)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes what trains into a checkpoint; sharded weights go with the optimizer's."""
        if is_sharded(self.trained) or not self.args.should_save or output_dir is None:
            return
        trained = {
            name: parameter.detach().cpu().contiguous()
            for name, parameter in self.trained.named_parameters()
            if parameter.requires_grad
        }
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file(trained, Path(output_dir) / WEIGHTS)
        check_weights(Path(output_dir) / WEIGHTS, trained)

    def gathered_state(self) -> dict[str, torch.Tensor]:
        """The whole model's weights; empty on other processes than the first."""
        if is_sharded(self.trained):
            return gathered(self.trained)
        return dict(self.trained.state_dict()) if self.args.should_save else {}
